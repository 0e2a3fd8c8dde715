#!/usr/bin/env python3
"""Writes the token ids that llama.cpp gives a set of varied texts, for the tests of core/text.

    pip install xllamacpp
    python3 scripts/text/compare_tokenizers.py MODEL.gguf core/text/tests/data/NAME.json

Each case is `[text, parse_special, ids]`; special tokens are added as the model's metadata says. `decoded` is what
llama.cpp makes of the ids.
"""

import json
import random
import sys
import urllib.request

import xllamacpp

# Text of every kind that tokenizers treat differently.
TEXTS = [
    "",
    "Hello",
    "Hello, world!",
    " leading space",
    "  two leading spaces",
    "trailing space ",
    "trailing spaces   ",
    " ",
    "  ",
    "   ",
    "    ",
    " " * 17,
    " " * 100,
    "\t",
    "\t\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\n" * 33,
    "\r\n",
    "\r\n\r\n",
    "a\r\nb\rc\nd",
    " \n",
    "\n ",
    " \n \n ",
    "a \n b",
    "a  b   c    d     e",
    "a\tb\t\tc",
    "tab\tand space \t mixed\t ",
    "\x0b\x0c",
    "\u00a0non-breaking\u00a0space\u00a0",
    "\u3000ideographic\u3000space",
    "zero\u200bwidth\u200djoiner\ufeff",
    "\u2028line\u2029paragraph",
    "The quick brown fox jumps over the lazy dog.",
    "It's, he'll, they've, I'm, we'd, you're, can't",
    "IT'S, HE'LL, THEY'VE, I'M, WE'D, YOU'RE, CAN'T",
    "o'clock rock'n'roll 'quoted' ''double'' '",
    "don’t it’s “quoted” ‘single’",
    "'s 't 're 've 'm 'll 'd 'x",
    "CamelCaseAndsnake_case and kebab-case",
    "ALLCAPS lowercase MiXeD",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "0",
    "1",
    "12",
    "123",
    "1234",
    "12345",
    "1234567890",
    "3.14159265358979",
    "1,000,000.00",
    "-1e-10 +2.5E+8 0x1F 0b1010 1_000",
    "2024-01-31T23:59:59Z",
    "١٢٣٤٥ १२३४ 一二三 ⅷ ½ ² ³ ①②③",
    "$100 €200 £300 ¥400 ₿",
    "100% #1 @user a&b c*d e^f g~h i`j",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "!!!???...,,,;;;:::---___===+++",
    "...…‥。、，！？；：",
    "(a) [b] {c} <d> «e» 「f」",
    "a+b=c; x<y>z; p|q; !r; ~s; t?u:v",
    "http://example.com/path?query=1&other=two#fragment",
    "user.name+tag@example.co.uk",
    "C:\\Windows\\System32\\ /usr/local/bin ~/file.txt ../..",
    "fn main() {\n    println!(\"Hello, {}!\", name);\n}\n",
    "def f(x):\n\treturn x ** 2  # square\n\n\nclass A:\n    pass\n",
    "int main(void) { return 0; } /* comment */ // line",
    "for (let i = 0; i < 10; i++) { a[i] += i; }",
    "SELECT * FROM t WHERE a = 'b' AND c IS NOT NULL;",
    "<html><body><h1>Title</h1><p class=\"x\">Text&nbsp;</p></body></html>",
    "{\"key\": [1, 2.5, null, true, \"string\\n\"], \"nested\": {\"a\": {}}}",
    "# Heading\n\n* item\n* item **bold** _it_\n\n```rust\nlet x = 1;\n```\n",
    "$\\sum_{i=1}^{n} \\frac{x_i}{n} = \\bar{x}$",
    "if x:\n        y = 1\n    else:\n            z = 2",
    "        eight spaces\n\t\ttwo tabs\n  \t mixed",
    "Ünïcödé façade naïve coöperate Ångström Čeština Łódź",
    "e\u0301 combining a\u0308\u0304 n\u0303 \u0301alone",
    "Straße GROẞ ﬁ ﬂ ﬃ ŉ ǆ",
    "İstanbul ıI iİ ſ K Å",
    "Привет, мир! Как дела? Съешь ещё этих мягких булок",
    "Γειά σου Κόσμε; Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "שלום עולם! מה שלומך?",
    "שָׁלוֹם with points",
    "مرحبا بالعالم كيف حالك؟",
    "بِسْمِ اللَّهِ الرَّحْمَٰنِ",
    "नमस्ते दुनिया क्षत्रिय",
    "வணக்கம் உலகம்",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "ສະບາຍດີ မင်္ဂလာပါ សួស្តី",
    "你好，世界！今天天气很好。",
    "中文和English混合123文本",
    "繁體中文測試，標點符號「引號」。",
    "こんにちは世界。カタカナとひらがなと漢字",
    "ｈａｌｆ　ｆｕｌｌ　ｗｉｄｔｈ ｶﾀｶﾅ １２３",
    "안녕하세요 세계! 한국어 텍스트",
    "ᄒ\u1161ᆫ jamo",
    "\U00020000\U0002a6d6 rare ideographs 𠮷野家",
    "Xin chào thế giới, Tiếng Việt có dấu",
    "Dobrý deň, ako sa máš? Jó napot kívánok! Dzień dobry",
    "አማርኛ ሰላም ᓀᐦᐃᔭᐍᐏᐣ ᏣᎳᎩ ქართული հայերեն",
    "😀",
    "😀😃😄😁",
    "Hello 😀 world 🌍!",
    "👨‍👩‍👧‍👦 family 👩🏽‍🚀 astronaut 🏳️‍🌈 flag",
    "🇩🇪🇫🇷🇯🇵 flags",
    "❤️ ♥ ☺︎ ☺️ ✅ ❌ ™ © ®",
    "🤖💻🔥✨🎉 emoji run",
    "a😀b🎉c",
    "→ ← ↑ ↓ ⇒ ⇔ ∀ ∃ ∈ ∉ ∅ ∑ ∏ √ ∞ ≈ ≠ ≤ ≥",
    "─│┌┐└┘├┤┬┴┼ ═║╔╗ ▀▄█▌▐░▒▓",
    "⠓⠑⠇⠇⠕ 𝓢𝓬𝓻𝓲𝓹𝓽 𝕕𝕠𝕦𝕓𝕝𝕖 𝟘𝟙𝟚",
    "\x00",
    "nul\x00inside",
    "\x01\x02\x03\x1b[31mred\x1b[0m\x7f",
    "\u0080\u0085\u009f\u00ad",
    "\ufffd replacement \uffff\ufdd0 noncharacters",
    "\U0010ffff\U000e0001\ue000 private",
    "▁",
    "▁▁",
    "a▁b ▁c▁ d",
    "Ġ Ċ ĉ Ā ł",
    "<0x0A> <0xFF> <0xZZ>",
    "<s> </s> <unk> <pad> <bos> <eos>",
    "<s>hello</s>",
    "<bos>hello<eos>",
    "<bos><bos>",
    " <bos> spaced <eos> ",
    "<pad><unk><mask>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<start_of_turn>user\nHi <end_of_turn> \n <start_of_turn>model\n",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
    "<|im_start|> spaced <|im_end|> ",
    "<|im_start|><|im_start|>",
    "<|im_start|",
    "|im_start|>",
    "<|endoftext|>",
    "a<|endoftext|>b<|endoftext|>",
    "<|endoftext|>\n\n<|endoftext|>  x",
    "<repo_name>x<file_sep>y<jupyter_start>z<empty_output>",
    "<reponame>owner/name<filename>a.py<gh_stars>10",
    "<issue_start><issue_comment>text<issue_closed>",
    "<unused0> <unused1><unused98>",
    "<unused99>[multimodal]<image_soft_token>",
    "<table><tr><td>cell</td></tr></table>",
    "<b>bold</b> <i>it</i> <h1>x</h1> <ul><li>",
    "[toxicity] [@BOS@]",
    "[INST] Hello [/INST] <<SYS>> <</SYS>>",
    "<|eot_id|><|begin_of_text|><|start_header_id|>",
    "In the beginning God created the heaven and the earth.",
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse",
    "It was the best of times, it was the worst of times, it was the age of wisdom",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababababababababababababab",
    "lalalalala nanananana hahahahaha",
    "the the the the the the",
    "x" * 300,
    "ab " * 60,
    "é" * 50,
    "的" * 50,
    "🎉" * 20,
    "1" * 60,
    "." * 60,
    "-" * 80,
    "=" * 65,
    "\n \n  \n   \n    \n",
    "\t \t  \t   \t",
    "word\n\nword\n\n\nword\n\n\n\nword",
    "end with newline\n",
    "end with spaces and newline  \n",
    "\n\nstart with newlines",
    "?!?!?!",
    "a.b.c.d",
    "A.B.C. U.S.A. e.g. i.e. etc.",
    "Mr. Smith's dog; Mrs. Jones' cat",
    "one,two,three , four ,five",
    "(1)(2)(3) [1][2] {{x}} {{{y}}}",
    "https://日本語.jp/パス?クエリ=値",
    "naïve-café—“résumé”…",
    "1st 2nd 3rd 4th 21st",
    "10km/h 5'10\" 37°C −40°F",
    "v1.2.3-rc.4+build.5",
    "deadbeef 0xDEADBEEF c0ffee",
    "MD5: d41d8cd98f00b204e9800998ecf8427e",
    "550e8400-e29b-41d4-a716-446655440000",
    "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXo=",
    "ATGCATGCATGCATGC MKTAYIAKQRQISFVKSHFSRQ",
    "C₆H₁₂O₆ + 6O₂ → 6CO₂ + 6H₂O",
    "ⅠⅡⅢ ㈠㈡ ㍻ ㎞ ™℠",
    "ﷺ ﷽",
    "a\u0300\u0301\u0302\u0303\u0304 zalgo t̸̢͝e̴͖͛x̵̹̋t̷̰̚",
    "\u202eright to left\u202c override",
    "soft\u00adhyphen non\u2011breaking",
    "مرحبا Hello שלום 你好 Привет",
    "l'été d'Artagnan aujourd'hui qu'il",
    "¿Qué tal? ¡Muy bien! año niño",
    "große Größe, Übergrößenträger",
    "ZürichBernGenf",
    "iPhone15ProMax GPT4o x86_64 utf8",
    "user: hi\nassistant: hello\nuser: ",
    "### Instruction:\nDo it.\n\n### Response:\n",
    "Q: 2+2?\nA: 4\n\nQ: 3+3?\nA:",
    "  indented\n    more\n      most\n",
]


def random_texts(count):
    """Mixtures of words, spaces, digits and characters of many scripts, from a fixed seed."""
    source = random.Random(20)
    alphabets = [
        "abcdefghijklmnopqrstuvwxyz",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "0123456789",
        "     ",
        "\n\t\r \u00a0\u2003",
        ".,;:!?'\"-_()[]{}<>|/\\@#$%^&*+=~`",
        "äöüßéèêñçøåæœ",
        "абвгдежзийклмн",
        "αβγδεζηθ",
        "的一是不了人我在有他这中大来上",
        "ひらがなカタカナ",
        "한국어텍스트",
        "אבגדהו",
        "ابتثجح",
        "कखगघङ",
        "😀🎉🔥👍🏽🇩🇪\u200d\ufe0f",
    ]
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(source.randint(2, 12)):
            alphabet = source.choice(alphabets)
            text += "".join(source.choice(alphabet) for _ in range(source.randint(1, 6)))
        texts.append(text)
    return texts


def main():
    model, out = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def post(path, body):
        request = urllib.request.Request(
            server.listening_address + path,
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    cases = []
    for text in TEXTS + random_texts(80):
        for parse_special in (False, True):
            body = {"content": text, "add_special": True, "parse_special": parse_special}
            ids = post("/tokenize", body)["tokens"]
            # Only texts with markers in them have two readings.
            if not parse_special or ids != cases[-1][2]:
                cases.append([text, parse_special, ids])
    with open(out, "w", encoding="ascii") as file:
        file.write('{"cases": [\n')
        file.write(",\n".join(json.dumps(case, separators=(",", ":")) for case in cases))
        file.write("\n]}\n")
    print(f"{out}: {len(cases)} cases", file=sys.stderr)


if __name__ == "__main__":
    main()
