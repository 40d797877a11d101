//! A certificate made at test time: self-signed, ECDSA P-256, for one address. DER written by hand, because that
//! is less than another dependency (RFC 5280 §4.1, RFC 5480).

use std::net::IpAddr;
use std::sync::Arc;

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// A certificate and its key.
pub(crate) struct Certificate {
    der: Vec<u8>,
    key: Vec<u8>,
}

impl Certificate {
    /// For a server at this address.
    pub(crate) fn new(address: IpAddr) -> Certificate {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random)
            .expect("randomness")
            .as_ref()
            .to_vec();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &key, &random)
            .expect("the key just made");
        let body = to_be_signed(address, pair.public_key().as_ref());
        let signature = pair.sign(&random, &body).expect("randomness");
        let der = tagged(
            SEQUENCE,
            &[&body[..], &ecdsa_with_sha256(), &bit_string(signature.as_ref())].concat(),
        );
        Certificate { der, key }
    }

    /// As a file that clients are told to trust.
    pub(crate) fn pem(&self) -> Vec<u8> {
        use base64::Engine;
        let text = base64::engine::general_purpose::STANDARD.encode(&self.der);
        let lines: Vec<&str> =
            (0..text.len()).step_by(64).map(|at| &text[at..text.len().min(at + 64)]).collect();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
            .into_bytes()
    }

    /// A server that shows it.
    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring knows them")
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from(self.der.clone())],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone())),
            )
            .expect("certificate and key belong together");
        Arc::new(config)
    }
}

fn to_be_signed(address: IpAddr, public_key: &[u8]) -> Vec<u8> {
    let version_3 = tagged(0xa0, &tagged(INTEGER, &[2]));
    let serial = tagged(INTEGER, &[1]);
    let name = {
        let value = [object(&[0x55, 4, 3]), tagged(UTF8_STRING, b"scoutd test")].concat();
        tagged(SEQUENCE, &tagged(SET, &tagged(SEQUENCE, &value)))
    };
    let validity = [
        tagged(GENERALIZED_TIME, b"20200101000000Z"),
        tagged(GENERALIZED_TIME, b"20991231235959Z"),
    ]
    .concat();
    let key_info = {
        let ec_public_key = object(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1]);
        let p256 = object(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7]);
        let algorithm = tagged(SEQUENCE, &[ec_public_key, p256].concat());
        tagged(SEQUENCE, &[algorithm, bit_string(public_key)].concat())
    };
    let extensions = {
        let octets = match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let names = tagged(SEQUENCE, &tagged(IP_ADDRESS, &octets));
        let subject_alt_name = [object(&[0x55, 0x1d, 0x11]), tagged(OCTET_STRING, &names)].concat();
        tagged(0xa3, &tagged(SEQUENCE, &tagged(SEQUENCE, &subject_alt_name)))
    };
    let parts = [
        version_3,
        serial,
        ecdsa_with_sha256(),
        name.clone(),
        tagged(SEQUENCE, &validity),
        name,
        key_info,
        extensions,
    ];
    tagged(SEQUENCE, &parts.concat())
}

fn ecdsa_with_sha256() -> Vec<u8> {
    tagged(SEQUENCE, &object(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2]))
}

fn object(encoded: &[u8]) -> Vec<u8> {
    tagged(OBJECT, encoded)
}

fn bit_string(bytes: &[u8]) -> Vec<u8> {
    tagged(BIT_STRING, &[&[0], bytes].concat())
}

fn tagged(tag: u8, content: &[u8]) -> Vec<u8> {
    let len = content.len();
    let mut out = vec![tag];
    match len {
        0..0x80 => out.push(len as u8),
        0x80..0x100 => out.extend([0x81, len as u8]),
        _ => out.extend([0x82, (len >> 8) as u8, len as u8]),
    }
    out.extend_from_slice(content);
    out
}

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OBJECT: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// `iPAddress` of GeneralName.
const IP_ADDRESS: u8 = 0x87;
