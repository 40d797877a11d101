//! The quantizers against blocks of the reference: byte for byte, and value for value when read back.

use safetensors::SafeTensors;
use scoutd_kernels::Format;
use scoutd_kernels::quantize::{dequantize_row, quantize_row};

const GOLDEN: &[u8] = include_bytes!("../../tests/golden/quant_golden.safetensors");

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = tensors.tensor(name).expect("a tensor of the fixture").data();
    data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

#[test]
fn blocks_equal_the_reference() {
    let tensors = SafeTensors::deserialize(GOLDEN).expect("the fixture is a safetensors file");
    let x = floats(&tensors, "x");
    for format in [Format::Q4_0, Format::Q4_1, Format::Q8_0, Format::Q4K, Format::Q5K, Format::Q6K]
    {
        let name = format.name().to_lowercase();
        let expected = tensors.tensor(&name).expect("blocks of the fixture").data();
        let mut found = vec![0; expected.len()];
        quantize_row(format, &x, &mut found);
        for (i, (found, expected)) in found
            .chunks(format.block_bytes())
            .zip(expected.chunks(format.block_bytes()))
            .enumerate()
        {
            assert_eq!(found, expected, "block {i} of {format}");
        }
        let expected = floats(&tensors, &format!("{name}.f32"));
        let mut values = vec![0.0; x.len()];
        dequantize_row(format, &found, &mut values);
        for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(value.to_bits(), expected.to_bits(), "value {i} of {format}");
        }
    }
}

#[test]
fn halves_round_to_nearest_even_and_read_back() {
    let x = [1.0f32, -2.5, 65504.0, 1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 6e-8, 0.0, -0.0];
    let f16 = [1.0f32, -2.5, 65504.0, 1.0, 1.0 + 4.0 / 2048.0, 5.960_464_5e-8, 0.0, -0.0];
    let bf16 = [1.0f32, -2.5, 65536.0, 1.0, 1.0, f32::from_bits(0x3381_0000), 0.0, -0.0];
    for (format, expected) in [(Format::F32, x), (Format::F16, f16), (Format::Bf16, bf16)] {
        let mut bytes = vec![0; format.row_bytes(x.len()).expect("values stand alone")];
        let mut values = [0.0; 8];
        quantize_row(format, &x, &mut bytes);
        dequantize_row(format, &bytes, &mut values);
        assert_eq!(values.map(f32::to_bits), expected.map(f32::to_bits), "{format}");
    }
}
