"""Prompts chosen by hand for what a tokenizer can get wrong, and a small vocabulary to read."""

import gzip
import json
from pathlib import Path

VOCABULARY = Path(__file__).parents[2] / "mlx_maple" / "text" / "vocabulary" / "merges.txt.gz"

PROMPTS = [
    "",
    " ",
    "a",
    "A",
    "a red maple leaf",
    "A Red MAPLE Leaf",
    "a photograph of an astronaut riding a horse",
    "masterpiece, best quality, 8k, ultra-detailed, (sharp focus:1.2), [blurry]",
    "portrait of a woman, oil on canvas, by Artemisia Gentileschi, 1612",
    "3d render of a 1950s diner @ night!!! #neon $5.99 50% off",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "don't can't I'm you're we've they'll he'd she's 'tis rock'n'roll",
    "DON'T CAN'T I'M YOU'RE WE'VE THEY'LL HE'D SHE'S",
    "'s't're've'm'll'd",
    "''s ''' 'x '' s",
    "it’s ‘quoted’ “double” „low“ «guillemets»",
    "snake_case kebab-case CamelCase path/to/file.png C:\\Windows",
    "http://example.com/?q=a+b&c=d#frag user@example.com",
    "&amp; &lt;b&gt; &#39; <b>bold</b>",
    "1234567890 12.5 1,000,000 1e-5 -3 ½ ¼ ² ³ ₂ ① Ⅳ ⅷ",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "!!! ??? ... --- ___ *** ~~~",
    "hello , world ! how are you ?",
    "a(b)c[d]e{f}g<h>i",
    "++++ (((( :::: |||| <| |> <|>",
    # white space of every kind, and what only Python takes for white space
    "tab\tnew\nline\r\nreturn\x0bvertical\x0cform",
    "  leading and trailing  ",
    "many     spaces   \t\n  between",
    "no\u00a0break en\u2002quad em\u2003space thin\u2009hair\u200aideographic\u3000space",
    "ogham\u1680space line\u2028separator paragraph\u2029separator narrow\u202fmath\u205fspace",
    "next\u0085line",
    "file\x1cgroup\x1drecord\x1eunit\x1fseparator",
    "mongolian\u180evowel zero\u200bwidth non\u200cjoiner joiner\u200dhere word\u2060joiner",
    "bom\ufeffinside soft\u00adhyphen left\u200eto\u200fright \u202aembed\u202c",
    "\u3000\u00a0\u2003",
    "\x1c\x1d\x1e\x1f",
    "\x00",
    "nul\x00bell\x07escape\x1b[31mdel\x7f",
    "\x80\x81\x9f c1",
    # accents, composed and not
    "café naïve façade Ångström jalapeño Zürich smørrebrød",
    "cafe\u0301 nai\u0308ve fac\u0327ade A\u030angstro\u0308m",
    "CAFÉ NAÏVE FAÇADE ÅNGSTRÖM",
    "e\u0301\u0323 e\u0323\u0301 \u1eb9\u0301 q\u0307\u0323 q\u0323\u0307",
    "a\u0345\u0334 a\u0334\u0345 \u0344 \u0340 \u0341 \u0343",
    "\u0301 lone \u0301accent",
    "ﬁ ﬂ ﬀ ﬃ ﬅ ligatures ĳ ǆ ǅ Ǆ ŉ",
    "Å Å A\u030a K Ω Ω kelvin ohm",
    "straße STRASSE STRAẞE ẞ ß",
    "İstanbul ISTANBUL ıstanbul istanbul İ i\u0307",
    "ΟΔΥΣΣΕΥΣ ὈΔΥΣΣΕΎΣ Σ ΑΣ ΑΣ. ΣΑ Σίσυφος ς",
    "ᾈᾉ ᾼ ῼ ᾳ Ἀθήνα ᾷ",
    "ǅ ǈ ǋ ǲ titlecase Ǆ Ǉ Ǌ Ǳ",
    "Ⓐⓐ ＡＢＣ ａｂｃ １２３ 𝐀𝐁𝐂 𝒜 𝔸 𝟙",
    "Ｆｕｌｌｗｉｄｔｈ，ｔｅｘｔ！",
    "K\u2126\u212a\u212b",
    "क़ \u0958 \u0915\u093c \u09dc \u0a33 \ufb1d \ufb2a",
    "Đặng Thùy Trâm phở bún chả Hà Nội",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig",
    "Þjóðólfur Æsir Œuvre Ðuro",
    # scripts
    "Съешь ещё этих мягких французских булок, да выпей чаю",
    "ЩИ ЁЖ Ѓ ѓ и\u0306 й Ї і\u0308",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "שָׁלוֹם עולם",
    "السلام عليكم ١٢٣ لَا",
    "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก ๑๒๓",
    "မင်္ဂလာပါ ខ្មែរ ລາວ",
    "გამარჯობა ᲒᲐᲛᲐᲠᲯᲝᲑᲐ Բարեւ",
    "አማርኛ ᚠᚢᚦ ᐃᓄᒃᑎᑐᑦ ᏣᎳᎩ ꭰꭱ",
    "你好，世界！一只红色的枫叶",
    "日本語のテキスト、カタカナ・ひらがな「括弧」",
    "か\u3099 が ハ\u309a パ ﾊﾟ",
    "한국어 \u1112\u1161\u11ab\u1100\u1173\u11af \uac00\u11a8",
    "漢字 豈 \uf900 \ufa0e \U0002f800",
    "中文English混合123テスト",
    "𐐀𐐨 𞤀𞤢 𐓀 𖹀 𑢠",
    "𠀀𠀁 𪜀 \U00030000",
    # letters and marks younger than some tables
    "\U00010570\U00010597 \ua7c0\ua7d0 \u2c2f \u1c89 \ua7cb\ua7cc\ua7da\ua7dc",
    "\U00010d50\U00010d70 \U00016ea0 \ua7ce \ua7d2 \ua7d4",
    "\U00031350 \U0002ebf0 \U000323b0 \U00016d40 \U00013460",
    "a\u0897\u0301 e\u1ac1\u0323\u0301 x\u0345\u1df6 o\u0323\u0c3c\u0301",
    "\U000105d2\u0307 \U000105c9 \U00011935\U00011930 \U00011938 \U00016d67\U00016d67",
    "\u0378 \u0380 \u05ff \ufdd0 \ufffe \uffff \U0001fffe \U0010ffff",
    "\ue000 private \uf8ff \U000f0000",
    "\ufffd replacement",
    # emoji
    "😀 🎉🎊 ❤️ ❤ ☀️ ✨",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇯🇵🇩🇪 1️⃣ #️⃣",
    "😀a😀 red😀leaf 🫨🪿 🩷",
    "¯\\_(ツ)_/¯ (╯°□°)╯︵ ┻━┻ ಠ_ಠ ʕ•ᴥ•ʔ",
    "→ ⇒ ∀x∈ℝ: ∑ √2 ≠ ≈ ∞ ° ± × ÷ € £ ¥ ₿ ™ © ®",
    "░▒▓█ ┌─┐ ♠♥♦♣ ♪♫ ☭",
    # special tokens, and what only looks like them
    "<|startoftext|>a cat<|endoftext|>",
    "<|startoftext|>",
    "<|endoftext|><|endoftext|>",
    "a<|endoftext|>b <|endoftext|> c",
    "<|STARTOFTEXT|>",
    "<|EndOfText|> <|ENDOFTEXT|>!!",
    "!<|STARTOFTEXT|>!! x<|ENDOFTEXT|>x",
    "<|startoftext|<|startoftext|>|> <|endoftext |> <|endoftex t|>",
    "e<|endoftext|>\u0301 caf<|startoftext|>e\u0301",
    "</w> a</w>b <w> ▁ Ġ Ċ ĠĠ",
    "#version: 0.2 i n t h",
    "a" * 200,
    "ab" * 100,
    "é" * 80,
    "😀" * 30,
    "9" * 40,
    "! " * 40,
    "word " * 90,
    "漢" * 50,
]

# Every curated prompt once more in the forms that users' prompts take.
VARIED = [
    *PROMPTS,
    *(prompt.upper() for prompt in PROMPTS if prompt.upper() != prompt),
    *(f"({prompt}), 4k" for prompt in PROMPTS[::2]),
    *(prompt.replace(" ", "\n ") + "\u3000" for prompt in PROMPTS[1::2]),
    *(prompt[::-1] for prompt in PROMPTS[::3]),
]


def write_small_vocabulary(folder: Path) -> tuple[Path, Path]:
    """A vocabulary as a pruned model has it: few merges, ids in another order, some bytes unknown.

    Every seventh of CLIP's first 3,000 merges is left out, with all that is built on it.
    """
    letters = [*map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])]
    letters += [chr(0x100 + i) for i in range(68)]
    tokens = {letter + end for letter in letters for end in ("", "</w>")}
    tokens -= {"z", "z</w>", "~</w>", "Ŀ", letters[-1], "Ļ</w>"}
    merges: list[str] = []
    for i, merge in enumerate(gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[:3000]):
        left, right = merge.split(" ")
        if i % 7 != 3 and left in tokens and right in tokens:
            merges.append(merge)
            tokens.add(left + right)
    ordered = ["<|endoftext|>", *sorted(tokens), "<|startoftext|>"]
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps({token: i for i, token in enumerate(ordered)}))
    merges_file.write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return vocab_file, merges_file
