"""A megabyte of mixed text, the same on every machine: what `run` and `golden` feed to the tokenizers.

Natural sentences of many scripts, code, JSON, digits, emoji, odd blanks, the texts of control tokens,
random characters of every general category, and bytes that are not UTF-8.
"""
import random
import sys
import unicodedata

SENTENCES = """Turn on the kitchen light, please. It's 21.5 °C and the naïve thermostat DOESN'T know.
Zapni světlo v kuchyni, prosím. Příliš žluťoučký kůň úpěl ďábelské ódy. Schalte bitte das Küchenlicht ein; heißer Straßenbelag!
Allume la lumière de la cuisine, s'il te plaît. L'été dernier, j'étais à l'hôtel. Enciende la luz; ¿cuántos años tiene el niño?
Включи свет на кухне, пожалуйста. Съешь же ещё этих мягких французских булок. Увімкни світло на кухні, будь ласка.
Άναψε το φως στην κουζίνα. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Mutfaktaki ışığı aç lütfen; İstanbul'da IŞIK.
请打开厨房的灯。今天的天气怎么样？ キッチンの電気をつけてください。今日は３７度です。부엌 불을 켜 주세요. 안녕하세요!
रसोई की बत्ती जला दो। नमस्ते दुनिया, यह एक परीक्षण है। রান্নাঘরের আলো জ্বালাও। சமையலறை விளக்கை போடு. వంటగది లైట్ వేయండి.
أضئ نور المطبخ من فضلك. اللُّغَةُ العَرَبِيَّةُ جميلة. הדלק את האור במטבח בבקשה. שָׁלוֹם עוֹלָם. آشپزخانه را روشن کن.
เปิดไฟในครัวหน่อย วันนี้อากาศดีมาก Bật đèn nhà bếp lên, việc này rất quan trọng. Slå på kjøkkenlyset, vær så snill; blåbærsyltetøy.
Աdelays խոհանոցի լույսը միացրու: სამზარეულოში შუქი ჩართე. ወጥ ቤቱን መብራት አብራ። Washa taa ya jikoni. ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ. ꯃꯩꯇꯩ.""".split("\n")

CODE = [
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # naïve\n\n\nprint(f\"{area(10)=}\")\n",
    "fn main() {\n\tlet x: Vec<u8> = vec![0u8; 1 << 20];\r\n\tprintln!(\"{}\", x.len());\r\n}\r\n",
    "{\"name\":\"light.turn_on\",\"parameters\":{\"entity_id\":[\"light.kitchen\"],\"brightness\":255}}\n",
    "#include <stdio.h>\nint main(void){for(int i=0;i<10;++i)printf(\"%d\\n\",i);return 0;}\n//--------------------------------\n",
    "SELECT id, name FROM users WHERE name LIKE '%O''Brien%' AND age >= 18;\n-- ====\n/* ** */\n",
    "<div class=\"a b\">\n        <p>Hello&nbsp;world</p>\n\n\n    </div>\n",
    "$ curl -sS http://127.0.0.1:8080/v1/models | jq '.data[].id' && echo $?\n",
    "I'LL we'Ve DON'T o'clock 'twas ''s it’s he'd'll\n",
]
EMOJI = "👍🏽 👨‍👩‍👧‍👦 🇨🇿 ☃️ 😀😀 ✅ 🏳️‍🌈 ©️ ① Ⅷ ½ ²".split(" ")
BLANKS = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\u00a0", "\u2003", "\u3000", "\u200b", "\x0b", "\x0c", "\x85", "\u2028"]
CONTROL = ["<|begin_of_text|>", "<|eot|>", "<|eot_id|>", "<|header_start|>", "<|start_header_id|>", "<|python_start|>", "<|image|>",
           "<|reserved_special_token_7|>", "<|eo", "|>", "<|", "<|end_of_text|>", "<|finetune_right_pad|>", "<s>", "</s>", "<0x0A>"]


def pools():
    """Characters by general category, a bounded sample of each; surrogates and what this Python does not know are left out."""
    by_category = {}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category not in ("Cs", "Cn", "Co"):
            by_category.setdefault(category, []).append(chr(code))
    # Characters that are newer than some of the regex engines involved would compare Unicode versions, not tokenizers.
    return {category: [c for c in chars if unicodedata.ucd_3_2_0.category(c) == category] for category, chars in sorted(by_category.items())}


def texts(seed, bytes_wanted):
    """Yields (text, raw bytes or None): `raw` is what the text was before ill-formed bytes became U+FFFD."""
    r = random.Random(seed)
    categories = [(name, chars) for name, chars in pools().items() if chars]

    def odd():
        name, chars = r.choice(categories)
        return "".join(r.choice(chars) for _ in range(r.randrange(1, 9)))

    def number():
        return str(r.randrange(10 ** r.randrange(1, 19))) + r.choice(["", ".5", "%", "e-6", " °C", "٣٤"])

    def run():
        return r.choice(["a", " ", "\n", "-", "=", "ab", "9", "é", "日", "\t"]) * r.choice([2, 3, 7, 30, 49, 64, 200])

    makers = [(lambda: r.choice(SENTENCES), 6), (lambda: r.choice(CODE), 4), (lambda: r.choice(EMOJI), 2), (lambda: r.choice(BLANKS), 5),
              (lambda: r.choice(CONTROL), 3), (odd, 6), (number, 3), (run, 1), (lambda: " ".join(r.choice(SENTENCES).split()[:r.randrange(1, 6)]), 6)]
    kinds, weights = [m for m, _ in makers], [w for _, w in makers]
    total = 0
    while total < bytes_wanted:
        text = "".join(r.choice(["", "", " "]) + r.choices(kinds, weights)[0]() for _ in range(r.randrange(1, 60)))
        raw = None
        if r.random() < 0.15:
            damaged = bytearray(text.encode())
            for _ in range(r.randrange(1, 8)):
                damaged[r.randrange(len(damaged))] = r.randrange(128, 256)
            raw = bytes(damaged)
            text = raw.decode("utf-8", "replace")
        total += len(text.encode())
        yield text, raw


# What `../../../src/tokenizer` must survive and get right whatever the vocabulary.
FIXED = ["", " ", "a", "\n", "  x", "x  ", "\x00", "\ufffd", "turn on the kitchen light\n\n{\"name\":\"light.turn_on\"}",
         "It's 21.5 °C — naïve ČAPKA's ΑΒΓδ  \n\n  x", "नमस्ते दुनिया", "don'T I'LL 1234567", " " * 1000, "a" * 5000, "\n" * 300 + "x", "é" * 500]
