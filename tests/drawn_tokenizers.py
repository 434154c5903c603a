"""Tokenizers drawn at random from what the tokenizers library and model folders can say."""

import dataclasses
import json
import random
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Regex, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

# Article 1 of the Universal Declaration of Human Rights, in 18 languages.
SENTENCES = (
    "All human beings are born free and equal in dignity and rights. They're endowed with reason!",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Größe, Übermut, Straße.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. L'œuvre, où ça?",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Qué? ¡Mañana!",
    "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İstanbul, ığdır.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "Toate ființele umane se nasc libere și egale în demnitate și în drepturi.",
    "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama.",
    "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. 1948, 12.5 % na 30",
    "Все люди рождаются свободными и равными в своём достоинстве и правах. Ёлка, йод.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وُهبوا عقلاً وضميراً",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. ｶﾞ ﬁ ２０",
)
STYLES = {
    "bert": {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    },
    "roberta": {
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    },
    "gpt2": {
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
}
NORMALIZERS = {
    "none": lambda: None,
    "NFC": normalizers.NFC,
    "NFKC": normalizers.NFKC,
    "lower": normalizers.Lowercase,
    "NFD, accents off": lambda: normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()]
    ),
    "NFKC, lower": lambda: normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    "BERT": normalizers.BertNormalizer,
    "BERT, accents kept": lambda: normalizers.BertNormalizer(strip_accents=False),
    "BERT, cased": lambda: normalizers.BertNormalizer(lowercase=False),
    "BERT, cased, accents off": lambda: normalizers.BertNormalizer(
        lowercase=False, strip_accents=True
    ),
    "BERT, no Chinese": lambda: normalizers.BertNormalizer(handle_chinese_chars=False),
    "digits to 0": lambda: normalizers.Replace(Regex(r"\d"), "0"),
}
GPT4 = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\s+"
WORDS = {
    "BERT": pre.BertPreTokenizer,
    "Whitespace": pre.Whitespace,
    "WhitespaceSplit": pre.WhitespaceSplit,
    "digits, BERT": lambda: pre.Sequence([pre.Digits(True), pre.BertPreTokenizer()]),
    "scripts": lambda: pre.Sequence([pre.WhitespaceSplit(), pre.UnicodeScripts()]),
}
BYTES = {
    "bytes": lambda: pre.ByteLevel(add_prefix_space=False),
    "bytes, prefix": lambda: pre.ByteLevel(add_prefix_space=True),
    "bytes, GPT-4": lambda: pre.Sequence(
        [pre.Split(Regex(GPT4), "isolated"), pre.ByteLevel(False, use_regex=False)]
    ),
    "digits, bytes": lambda: pre.Sequence([pre.Digits(True), pre.ByteLevel(False)]),
}
PIECES = {
    f"metaspace, {scheme}": lambda scheme=scheme: pre.Metaspace(prepend_scheme=scheme)
    for scheme in ("always", "first", "never")
} | {"words, metaspace": lambda: pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])}
MODELS = {"WordPiece": WORDS, "bytes": BYTES, "BPE": PIECES, "Unigram": PIECES}
POST_PROCESSORS = ("none", "template", "BERT", "RoBERTa", "bytes")
CLASSES = (
    None,
    "no file",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "BertTokenizer",
    "BertTokenizerFast",
    "DistilBertTokenizerFast",
    "RobertaTokenizerFast",
    "GPT2Tokenizer",
    "LlamaTokenizerFast",
    "XLMRobertaTokenizer",
    "AlbertTokenizerFast",
    "DebertaV2TokenizerFast",
    "ElectraTokenizerFast",
    "CamembertTokenizerFast",
    "UnknownTokenizer",
)
MASKED = ("bert", "distilbert", "roberta", "electra", "xlm-roberta", "modernbert")
CAUSAL = ("gpt2", "llama")
ADDED = {
    "none": [],
    "a word": [AddedToken("free")],
    "spaces inside": [AddedToken("born free")],
    "lstrip": [AddedToken("und", lstrip=True), AddedToken("и", rstrip=True)],
    "single": [AddedToken("en", single_word=True), AddedToken("É", normalized=False)],
    "special": [AddedToken("<extra>", special=True)],
}


@dataclasses.dataclass(frozen=True)
class Draw:
    """One tokenizer of the space, by the names of its parts."""

    model: str
    normalizer: str
    pre_tokenizer: str
    post_processor: str
    declared_class: str | None
    model_type: str
    style: str
    added: str
    is_limited: bool
    states_roles: bool

    @property
    def is_masked(self) -> bool:
        return self.model_type in MASKED

    @property
    def tokens(self) -> dict[str, str]:
        """Role -> token."""
        return STYLES[self.style]


def draw(seed: int) -> Draw:
    """Draw a tokenizer and the model's type that it lies beside."""
    rng = random.Random(seed)
    model = rng.choice(list(MODELS))
    model_type = rng.choice(MASKED + CAUSAL)
    styles = ["bert", "roberta"] if model_type in MASKED else list(STYLES)
    return Draw(
        model,
        rng.choice(list(NORMALIZERS)),
        rng.choice(list(MODELS[model])),
        rng.choice(POST_PROCESSORS),
        rng.choice(CLASSES),
        model_type,
        rng.choice(styles),
        rng.choice(list(ADDED)),
        rng.random() < 0.2,
        rng.random() < 0.7,
    )


def make_backend(one: Draw, lines: list[str]) -> tokenizers.Tokenizer:
    """Train the tokenizer on lines."""
    special, unknown = list(dict.fromkeys(one.tokens.values())), one.tokens["unk_token"]
    kinds = {
        "WordPiece": lambda: models.WordPiece(unk_token=unknown),
        "bytes": models.BPE,
        "BPE": lambda: models.BPE(unk_token=unknown, fuse_unk=True),
        "Unigram": models.Unigram,
    }
    num = 600 + len(set("".join(lines)))
    options = {"special_tokens": special, "show_progress": False, "vocab_size": num}
    trainer = {
        "WordPiece": lambda: trainers.WordPieceTrainer(**options),
        "bytes": lambda: trainers.BpeTrainer(initial_alphabet=pre.ByteLevel.alphabet(), **options),
        "BPE": lambda: trainers.BpeTrainer(**options),
        "Unigram": lambda: trainers.UnigramTrainer(unk_token=unknown, **options),
    }[one.model]()
    backend = tokenizers.Tokenizer(kinds[one.model]())
    normalizer = NORMALIZERS[one.normalizer]()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = MODELS[one.model][one.pre_tokenizer]()
    backend.train_from_iterator(lines, trainer)
    backend.decoder = {
        "WordPiece": tokenizers.decoders.WordPiece,
        "bytes": tokenizers.decoders.ByteLevel,
    }.get(one.model, tokenizers.decoders.Metaspace)()
    backend.add_tokens(ADDED[one.added])
    _set_post_processor(backend, one)
    if one.is_limited:
        backend.enable_truncation(16)
        backend.enable_padding(length=16)
    return backend


def _set_post_processor(backend: tokenizers.Tokenizer, one: Draw) -> None:
    vocabulary, tokens = backend.get_vocab(), one.tokens
    start = tokens.get("cls_token", tokens.get("bos_token"))
    end = tokens.get("sep_token", tokens.get("eos_token"))
    pair = (end, vocabulary[end]), (start, vocabulary[start])
    if one.post_processor != "none":
        backend.post_processor = {
            "template": lambda: processors.TemplateProcessing(
                single=f"{start} $A {end}",
                pair=f"{start} $A {end} $B:1 {end}:1",
                special_tokens=list(dict.fromkeys([pair[1], pair[0]])),
            ),
            "BERT": lambda: processors.BertProcessing(*pair),
            "RoBERTa": lambda: processors.RobertaProcessing(*pair),
            "bytes": lambda: processors.ByteLevel(trim_offsets=True),
        }[one.post_processor]()


SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "embedding_size": 32,
    "max_position_embeddings": 70,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
}


def make_teacher(one: Draw, folder: Path, lines: list[str]) -> tokenizers.Tokenizer:
    """Save a tiny model of the drawn type beside the drawn tokenizer; return the tokenizer."""
    backend = make_backend(one, lines)
    vocabulary, tokens = backend.get_vocab(), one.tokens
    pad = vocabulary[tokens.get("pad_token", tokens["unk_token"])]
    config_class = type(transformers.AutoConfig.for_model(one.model_type))
    names, known = config_class.attribute_map, config_class().to_dict()
    wanted = SIZES | {"vocab_size": backend.get_vocab_size(), "pad_token_id": pad}
    if one.model_type in ("roberta", "xlm-roberta"):
        wanted |= {"max_position_embeddings": 66 + pad, "type_vocab_size": 1}
    entries = {names.get(name, name): value for name, value in wanted.items()}
    ids = {f"{role}_id": vocabulary[token] for role, token in tokens.items()}
    config = config_class(**{key: value for key, value in (ids | entries).items() if key in known})
    auto = transformers.AutoModelForMaskedLM if one.is_masked else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    if one.declared_class != "no file":
        content = dict(one.tokens) if one.states_roles else {}
        if one.declared_class:
            content["tokenizer_class"] = one.declared_class
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
