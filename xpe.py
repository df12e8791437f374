"""Cross-Prompt Encoder (XPE): soft prompts for languages that a frozen encoder hardly knows.

A minimal, pure-PyTorch, single-file reference implementation of "Cross-Prompt Encoder for Low-Performing
Languages" (Mikaberidze, Saghinadze, Ostermann, Mueller).  A few trained vectors stand in front of a frozen
XLM-R, which then classifies topics (SIB-200) in languages that it was never trained on:

    python xpe.py --toy                                          # offline, half a minute, synthetic languages
    python xpe.py --method dual --xpe-ratio 0.7 --source joshi5  # the paper's setting (Table 1)
    python xpe.py --backbone DIR --data DIR --steps 462 --lr 5e-4 --prompt-lr 5e-2        # a local encoder

Left out on purpose: other tasks than classification, several GPUs, prompts in deeper layers.
Letters used throughout: B batch, T text length, P prompt length (the paper's n), H hidden size (d), C classes.
Places where the paper is silent or differs are tagged `PAPER section:` or `AUTHORS:` (their released program).
"""
import argparse
import csv
import dataclasses
import difflib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import groups

# ----------------------------------------------------------------------------------------------------------
# Configuration: every hyperparameter, its default (the paper's), its unit and its source


def setting(default, text):
    """A field of Config; its text is the comment, and the line that --help prints."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """Everything that defines a run.  The command line is made from it: `prompt_lr` is `--prompt-lr`."""
    method: str = setting("dual", "spt, xpe or dual: a free soft prompt, an encoded one, or both (section 3)")
    xpe_ratio: float = setting(None, "share of the prompt that is encoded, in (0, 1); dual only [0.7] (4.3)")
    source: str = setting("joshi5", "languages to train on: enarzho, joshi5, seen, or codes with commas (4.2)")
    languages: str = setting("all", "languages to test on: all, or codes with commas")
    backbone: str = setting("FacebookAI/xlm-roberta-large", "encoder: hub name or local folder (4.1)")
    data: str = setting("Davlan/sib200", "hub name, or folder with <code>/{train,dev,test}.tsv (4.1)")
    out: str = setting("runs", "folder that holds one folder per run")
    seed: int = setting(0, "random seed; the paper averages 10 (4.3)")
    steps: int = setting(24_000, "optimization steps on the source languages (4.4)")
    batch_size: int = setting(32, "sentences a step (4.4)")
    lr: float = setting(5e-5, "peak learning rate of prompt encoder and head (4.4)")
    prompt_lr: float = setting(5e-3, "peak learning rate of the standard soft prompt (4.4)")
    weight_decay: float = setting(None, "decoupled decay of encoder and head [0.1; recipe released: 0.01] (4.4)")
    warmup: float = setting(0.1, "share of the steps with linear warm-up (not in the paper)")
    cycles: int = setting(2, "cosine cycles, each from the peak to zero (4.4)")
    patience: int = setting(20, "epochs without a better dev loss that end the run, from half-time on (4.4)")
    clip: float = setting(1.0, "global gradient norm (not in the paper)")
    prompt_length: int = setting(20, "virtual tokens P (4.4)")
    mlp_hidden: int = setting(256, "width of the prompt encoder (not in the paper)")
    dropout: float = setting(0.1, "dropout in the prompt encoder (not in the paper)")
    head_dropout: float = setting(0.1, "dropout in the classification head (not in the paper)")
    backbone_dropout: str = setting("on", "on or off: the frozen backbone's own dropout while training")
    pool: str = setting("first", "what the head reads: first (virtual token) or bos (the text's <s>)")
    recipe: str = setting("paper", "paper or released: where the authors' program trains differently")
    max_length: int = setting(164, "longest text in tokens (not in the paper)")
    dtype: str = setting("auto", "backbone weights: fp32, bf16, or auto: bf16 on a GPU, else fp32")
    device: str = setting("auto", "cpu, cuda, cuda:1, ..., or auto: cuda where there is one")
    toy: bool = setting(False, "synthetic languages and a tiny random encoder: no network, half a minute")


# ----------------------------------------------------------------------------------------------------------
# The prompts (sections 3.1, 3.2) and the classifier around them.  Needs only `import torch`: copy it alone.


class SoftPrompt(torch.nn.Module):
    """SPT (4.3): `length` free vectors.  forward() -> (P, H).  Init N(0, 1)."""

    def __init__(self, length, hidden):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.randn(length, hidden))

    def forward(self):
        return self.vectors                                          # (P, H)


class CrossPromptEncoder(torch.nn.Module):
    """XPE (3.1): F_theta(pseudo prompt), one small MLP applied to each vector alone.  forward() -> (P, H)."""

    def __init__(self, length, hidden, mlp_hidden=256, dropout=0.1):
        super().__init__()
        nn = torch.nn
        self.pseudo_prompt = nn.Parameter(torch.randn(length, hidden))
        self.mlp = nn.Sequential(                                    # AUTHORS: "two layers" are three Linears
            nn.Linear(hidden, mlp_hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(mlp_hidden, mlp_hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(mlp_hidden, hidden))

    def forward(self):
        return self.mlp(self.pseudo_prompt)                          # (P, H) -> (P, H)


class DualPrompt(torch.nn.Module):
    """DUAL (3.2): the standard part first, the encoded part second.  forward() -> (P, H)."""

    def __init__(self, standard, encoded):
        super().__init__()
        self.standard, self.encoded = standard, encoded

    def forward(self):
        return torch.cat([self.standard(), self.encoded()])          # (P_spt, H) + (P_xpe, H) -> (P, H)


def build_prompt(method, length, hidden, ratio=0.7, **encoder):
    """The prompt of a method: its share of encoded vectors is 0 (spt), `ratio` (dual) or 1 (xpe).

    `encoder` goes to CrossPromptEncoder (mlp_hidden, dropout).  Raises ValueError where DUAL has no room.
    """
    n = round(length * {"spt": 0.0, "dual": ratio, "xpe": 1.0}[method])                # encoded vectors
    if method == "dual":
        if length < 2:
            raise ValueError("a dual prompt needs a length of at least 2: one standard, one encoded vector")
        n = min(max(n, 1), length - 1)
    parts = [SoftPrompt(length - n, hidden)] * (n < length) + [CrossPromptEncoder(n, hidden, **encoder)] * (n > 0)
    return DualPrompt(*parts) if len(parts) == 2 else parts[0]


class ClassificationHead(torch.nn.Module):
    """XLM-R's head: (B, H) -> dropout, Linear, tanh, dropout, Linear -> (B, C).  Init N(0, 0.02), as there."""

    def __init__(self, hidden, num_labels, dropout=0.1):
        super().__init__()
        self.dense, self.out_proj = torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, num_labels)
        self.dropout = torch.nn.Dropout(dropout)
        for linear in (self.dense, self.out_proj):
            torch.nn.init.normal_(linear.weight, std=0.02)
            torch.nn.init.zeros_(linear.bias)

    def forward(self, x):
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


class PromptedClassifier(torch.nn.Module):
    """A frozen backbone that reads [prompt | <s> text </s>], and a head on one position of its last layer."""

    def __init__(self, backbone, prompt, num_labels, pool="first", head_dropout=0.1):
        super().__init__()
        self.backbone, self.prompt, self.pool = backbone, prompt, pool
        self.head = ClassificationHead(backbone.config.hidden_size, num_labels, head_dropout)

    def forward(self, input_ids, attention_mask):
        """(B, T) token ids and their mask, 1 on text and 0 on right padding -> logits (B, C), fp32."""
        words = self.backbone.get_input_embeddings()(input_ids)                              # (B, T, H)
        prompt = self.prompt().to(words.dtype)             # encoded once a step, not once an example (P, H)
        P = len(prompt)
        x = torch.cat([prompt.expand(len(words), -1, -1), words], dim=1)                     # (B, P + T, H)
        mask = torch.nn.functional.pad(attention_mask, (P, 0), value=1)                      # (B, P + T)
        # The backbone adds positions 0 .. P+T-1 and LayerNorm itself: the prompt enters below both.
        states = self.backbone(inputs_embeds=x, attention_mask=mask).last_hidden_state       # (B, P + T, H)
        # AUTHORS: their head, like PEFT's, reads position 0: the first virtual token, not <s>.
        return self.head(states[:, P if self.pool == "bos" else 0].float())                  # (B, C)

    def cache_prompt(self):
        """Keep only the finished prompt (3.1): encoder and pseudo prompt are not needed at inference."""
        self.eval()
        with torch.no_grad():
            finished = self.prompt().clone()                                                 # (P, H)
        self.prompt = SoftPrompt(*finished.shape)
        self.prompt.vectors = torch.nn.Parameter(finished, requires_grad=False)
        return self


# ----------------------------------------------------------------------------------------------------------
# Optimizer and schedule (section 4.4).  Needs only `import torch`: copy it alone.


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern, 2018) with an external learning rate and no momentum.

    For a gradient G (R, C) only the row and column means of the running average of G^2 are kept, R + C numbers:
    V ~ row col^T / mean(row), averaged with beta2 = 1 - t^decay_rate.  Smaller tensors keep V whole.
    The update G / sqrt(V) is divided by max(1, RMS / clip_threshold); weight decay is decoupled.  Equal to
    transformers' Adafactor with scale_parameter, relative_step and warmup_init off.
    """

    def __init__(self, params, lr, weight_decay=0.0, clip_threshold=1.0, decay_rate=-0.8, eps=1e-30):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, clip_threshold=clip_threshold,
                                      decay_rate=decay_rate, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = self.update(p, group)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss

    def update(self, p, group):
        """The clipped, normalised gradient of one parameter; advances its running averages."""
        g, s = p.grad, self.state[p]
        s["step"] = t = s.get("step", 0) + 1
        beta2 = 1 - t ** group["decay_rate"]                         # 0 at t = 1: the first step needs no history
        square = g * g + group["eps"]
        if g.dim() < 2:
            v = s["v"] = torch.lerp(square, s.get("v", square), beta2)
            u = g * v.rsqrt()
        else:
            row, col = square.mean(-1), square.mean(-2)                                      # (R), (C)
            row = s["row"] = torch.lerp(row, s.get("row", row), beta2)
            col = s["col"] = torch.lerp(col, s.get("col", col), beta2)
            r = (row / row.mean(-1, keepdim=True)).rsqrt()
            u = g * r.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)                              # (R, C)
        rms = u.square().mean().sqrt()
        return u / (rms / group["clip_threshold"]).clamp(min=1.0)    # no .item(): a GPU would wait for it


def cosine_with_restarts(step, warmup, total, cycles=2):
    """Factor in [0, 1] on the learning rate at `step` (0-based): linear warm-up, then `cycles` cosines to 0."""
    from math import cos, pi
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return 0.0 if progress >= 1 else 0.5 * (1 + cos(pi * (cycles * progress % 1)))


# ----------------------------------------------------------------------------------------------------------
# Backbone and data


class InputError(Exception):
    """Something the user can mend: main prints its one line and exits with code 2."""


class Split(NamedTuple):
    """Sentences of one or more languages, on the device as a whole: 205 languages are some 60 MB."""
    ids: torch.Tensor             # (N, L) token ids, right-padded
    mask: torch.Tensor            # (N, L) 1 on tokens, 0 on padding
    labels: torch.Tensor          # (N,)
    lengths: np.ndarray           # (N,) tokens, on the host: a batch's width is known without asking the device
    languages: np.ndarray         # (N,) codes

    def batch(self, rows):
        """Rows (B,) -> ids (B, T), mask (B, T), labels (B,); T is their longest text, to a multiple of 4."""
        T = min(-(-int(self.lengths[rows].max()) // 4) * 4, self.ids.shape[1])
        rows = torch.as_tensor(rows).to(self.ids.device, non_blocking=True)
        return self.ids[rows, :T], self.mask[rows, :T], self.labels[rows]


def load_backbone(name, device="cpu", dtype=torch.float32, dropout=True):
    """The frozen encoder and its tokenizer, from the hub, a local folder, or "toy".  Raises InputError."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging
    if name == "toy":
        return toy_backbone(device, dtype, dropout)
    logging.set_verbosity_error()                                    # "unused classifier weights": by intention
    logging.disable_progress_bar()
    # The attention that is fastest in training: on a CPU the fused one is slow in bf16, and only there.
    attention = "eager" if torch.device(device).type == "cpu" and dtype == torch.bfloat16 else "sdpa"
    off = {} if dropout else dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        backbone = AutoModel.from_pretrained(name, dtype=dtype, attn_implementation=attention,
                                             add_pooling_layer=False, **off)
    except Exception as error:                     # the libraries raise many kinds; all mean the same to a user
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load the backbone {name!r} ({why[0][:150]}); give a local folder with "
                         "--backbone DIR, or --toy, which needs no download") from None
    tokenizer.padding_side = "right"
    return backbone.to(device).requires_grad_(False), tokenizer


def text_folder(data):
    """Whether `data` is a folder in SIB-200's own layout, <code>/{train,dev,test}.tsv."""
    return any(Path(data).glob("*/*.tsv"))


def available(data):
    """The language codes that `data` has."""
    if text_folder(data):
        return sorted(p.name for p in Path(data).iterdir() if any(p.glob("*.tsv")))
    if Path(data).is_dir():
        from datasets import get_dataset_config_names
        return sorted(get_dataset_config_names(data))
    return list(groups.LANGUAGES)


def load_language(data, code, split, labels=None):
    """Texts and label names of one language; `split` is train, dev or test.

    With `labels`, every label must be one of them.  Raises InputError that names the file and line.
    """
    if data == "toy":
        return toy_language(code, split)
    rows = read_tsv(Path(data, code, split + ".tsv")) if text_folder(data) else read_dataset(data, code, split)
    texts, names = [], []
    for where, text, label in rows:
        if not text or not text.strip():
            raise InputError(f"{where}: empty text")
        if not label or (labels and label not in labels):
            raise InputError(f"{where}: unknown label {label!r}; known: {', '.join(labels or groups.LABELS)}")
        texts.append(text)
        names.append(label)
    if not texts:
        raise InputError(f"no {split} rows for {code} in {data}")
    return texts, names


def read_tsv(path):
    """(place, text, label) of each row.  SIB-200's files are CSV with tabs: fields may be quoted."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if not {"category", "text"} <= set(reader.fieldnames or ()):
                raise InputError(f"{path}: needs the columns index_id, category, text")
            return [(f"{path}:{reader.line_num}", row["text"], row["category"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_dataset(data, code, split):
    """(place, text, label) of each row of a data set on the hub, or of a local folder in its format."""
    import datasets
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(data, code, split={"dev": "validation"}.get(split, split))
        return [(f"{data} {code} {split} row {i}", r["text"], r["category"]) for i, r in enumerate(rows)]
    except Exception as error:                     # as above: offline, no such config, no such column, ...
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load {code} of {data!r} ({why[0][:150]}); give a local folder with "
                         "--data DIR, or --toy, which needs no download") from None


def known_labels(data, codes):
    """The labels of the training rows, sorted: a label's place here is its class number."""
    names = {label for code in codes for label in load_language(data, code, "train")[1]}
    if names > set(groups.LABELS):                 # SIB-200 and something more: a slip, not an eighth topic
        names = set(groups.LABELS)
    return sorted(names)


def load_split(data, codes, split, labels, tokenizer, device, max_length=164):
    """One Split with all sentences of `codes`, tokenized once."""
    texts, names, languages = [], [], []
    for code in codes:
        t, n = load_language(data, code, split, labels)
        texts, names, languages = texts + t, names + n, languages + [code] * len(t)
    e = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    y = torch.tensor([labels.index(name) for name in names])
    return Split(e["input_ids"].to(device), e["attention_mask"].to(device), y.to(device),
                 e["attention_mask"].sum(1).numpy(), np.array(languages))


# ----------------------------------------------------------------------------------------------------------
# The toy: synthetic languages under real codes, and a tiny random encoder.  Its numbers mean nothing.

TOY = dict(backbone="toy", data="toy", steps=300, lr=3e-3, prompt_lr=5e-2, max_length=32)


def toy_backbone(device, dtype, dropout):
    """A random two-layer XLM-R over a vocabulary of 70 topic words, 50 filler words and 300 foreign words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel
    words = ["<s>", "<pad>", "</s>", "<unk>"] + [f"{kind}{i}" for kind, n in
                                                 (("topic", 70), ("filler", 50), ("foreign", 300)) for i in range(n)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        pad_token="<pad>", cls_token="<s>", sep_token="</s>")
    rate = 0.1 if dropout else 0.0
    config = XLMRobertaConfig(vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                              intermediate_size=128, max_position_embeddings=130, type_vocab_size=1,
                              initializer_range=0.1, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
    with torch.random.fork_rng(devices=[]):        # the same encoder whatever the seed, like a pretrained one
        torch.manual_seed(0)
        backbone = XLMRobertaModel(config, add_pooling_layer=False)
        topics = backbone.get_input_embeddings().weight.data[4:74].view(7, 10, 64)           # a view: 10 words each
        topics += torch.randn(7, 1, 64)            # words of one topic look alike, as after pretraining
    return backbone.to(device, dtype).requires_grad_(False), tokenizer


def toy_language(code, split):
    """Sentences of half topic words, half filler.  A topic word is foreign, which tells nothing, more often
    the worse the backbone knows the language: 5 % for seen ones, 65 % for unseen, 90 % for low-performing."""
    foreign = 0.05 if code in groups.SEEN else 0.9 if code in groups.LOW_PERFORMING else 0.65
    rng = random.Random(f"{code} {split}")
    texts, names = [], []
    for _ in range({"train": 140, "dev": 35, "test": 35}[split]):
        topic = rng.randrange(len(groups.LABELS))
        words = [f"filler{rng.randrange(50)}" for _ in range(rng.randint(3, 6))]
        words += [f"foreign{rng.randrange(300)}" if rng.random() < foreign else f"topic{topic * 10 + rng.randrange(10)}"
                  for _ in range(rng.randint(3, 6))]
        rng.shuffle(words)
        texts.append(" ".join(words))
        names.append(groups.LABELS[topic])
    return texts, names


# ----------------------------------------------------------------------------------------------------------
# Training and evaluation (section 4.4)


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived, and what was done so far is safe."""


class NonFinite(Exception):
    """The loss became infinite or NaN; the last checkpoint is untouched."""


def predict(model, split, stop=(), tokens=8192):
    """Logits (N, C) of every sentence, in order: one pass sorted by length, about `tokens` positions a batch."""
    from tqdm import tqdm
    model.eval()
    order, at, parts, P = np.argsort(-split.lengths, kind="stable"), 0, [], len(model.prompt())
    with torch.inference_mode(), tqdm(total=len(order), leave=False, disable=None, unit="sentence") as bar:
        while at < len(order):
            if stop:
                raise Stopped
            rows = order[at:at + max(1, tokens // (int(split.lengths[order[at]]) + P))].copy()
            ids, mask, _ = split.batch(rows)
            parts.append(model(ids, mask))                                                   # (B, C)
            at += len(rows)
            bar.update(len(rows))
    return torch.cat(parts)[torch.as_tensor(np.argsort(order)).to(split.ids.device)].clone()  # (N, C)


def evaluate(model, split, stop=()):
    """({code: accuracy in percent}, mean loss, predicted classes (N,)) on a Split."""
    logits = predict(model, split, stop)
    loss = torch.nn.functional.cross_entropy(logits, split.labels).item()
    guess = logits.argmax(-1)
    right = (guess == split.labels).cpu().numpy()
    codes = dict.fromkeys(split.languages.tolist())
    return {c: float(100 * right[split.languages == c].mean()) for c in codes}, loss, guess.cpu().numpy()


def epoch_batches(lengths, size, seed, epoch):
    """The epoch's batches of row numbers: shuffled, similar lengths together (AUTHORS), shuffled again.

    A function of (seed, epoch) alone, so that a resumed run needs no state of a data loader.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    pool = size * min(50, max(1, len(order) // (4 * size)))          # lengths are sorted within pools of batches
    batches = []
    for at in range(0, len(order), pool):
        rows = order[at:at + pool]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        batches += [rows[i:i + size] for i in range(0, len(rows), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def parameter_groups(model, cfg):
    """Parameters with equal settings together (4.4); recipe `released` is what the authors' program does."""
    released = cfg.recipe == "released"
    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        lr, decay = cfg.lr, cfg.weight_decay
        if name.endswith("vectors"):                                 # PAPER 4.4: 5e-3, no decay, always
            lr, decay = cfg.prompt_lr, 0.0
            if released and cfg.method == "dual":                    # AUTHORS: the small rate in DUAL
                lr = cfg.lr
        elif released and name.endswith("pseudo_prompt"):            # PAPER 4.4: a part of the encoder
            lr, decay = cfg.prompt_lr, 0.0                           # AUTHORS: the large rate, no decay
        elif released and name.endswith("bias"):                     # AUTHORS: no decay on biases
            decay = 0.0
        found.setdefault((lr, decay), []).append(p)
    return [dict(params=p, lr=lr, peak=lr, weight_decay=decay) for (lr, decay), p in found.items()]


def trainable(model):
    """{name: tensor} of what is trained; the frozen backbone is not in it."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def copy_into(model, tensors):
    """Write {name: tensor} into a model's parameters of these names."""
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(tensors[name])


def train_epoch(model, data, optimizer, cfg, run, stop):
    """The rest of the epoch that `run` stands in.  No step waits for the device: losses are read at its end."""
    batches = epoch_batches(data.lengths, cfg.batch_size, cfg.seed, len(run["curve"]))
    first = len(run["curve"]) * len(batches)                         # the epoch's first step
    last = min(first + len(batches), cfg.steps)
    if run["losses"] is None:
        run["losses"] = torch.zeros(len(batches), device=data.ids.device)
    model.train()
    for step in progress(range(run["step"], last), run, cfg):
        if stop:
            break
        factor = cosine_with_restarts(step, math.ceil(cfg.warmup * cfg.steps), cfg.steps, cfg.cycles)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        ids, mask, y = data.batch(batches[step - first])
        loss = torch.nn.functional.cross_entropy(model(ids, mask), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        run["losses"][step - first] = loss.detach()
        run["step"], run["factor"] = step + 1, factor
    losses = run["losses"][:run["step"] - first].tolist()            # here the host waits, once an epoch
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NonFinite(f"step {first + i + 1}: the loss is {loss}; the batch's languages are "
                            f"{', '.join(sorted(set(data.languages[batches[i]])))}; the last checkpoint is kept")
    return sum(losses) / max(1, len(losses))


def progress(steps, run, cfg):
    """`steps` with a bar on a terminal: loss and dev accuracy as last read, learning rate, time left."""
    from tqdm import tqdm
    bar = tqdm(steps, initial=run["step"], total=cfg.steps, leave=False, disable=None, unit="step", mininterval=1)
    shown = 0.0
    for step in bar:
        yield step
        if not bar.disable and time.time() - shown > 1:              # reading a loss makes a GPU wait: once a second
            shown, k = time.time(), run["step"] - len(run["curve"]) * len(run["losses"])
            dev = run["curve"][-1]["dev_accuracy"] if run["curve"] else float("nan")
            bar.set_postfix_str(f"loss {run['losses'][k - 1]:.3f} lr {cfg.lr * run['factor']:.1e} dev {dev:.1f}%")


def train(model, data, dev, cfg, folder, stop=()):
    """Train on the Split `data`; keep what is best on the Split `dev`; -> the record of the run (a dict).

    An evaluation and a checkpoint end each epoch.  A checkpoint in `folder` is gone on from, and the end is the
    same to the last bit.  Raises Stopped (after a checkpoint) and NonFinite (the last checkpoint stays).
    """
    optimizer = Adafactor(parameter_groups(model, cfg), lr=cfg.lr)
    run = dict(step=0, curve=[], losses=None, factor=0.0, best=None, waited=0, seconds=0.0)
    resume(model, optimizer, run, folder)
    began = time.time() - run["seconds"]
    head = "epoch    step   loss   dev loss   dev acc.   majority       lr   seconds     left"
    print(head)
    while not run["curve"] or (run["step"] < cfg.steps and run["waited"] < cfg.patience):
        try:
            loss = train_epoch(model, data, optimizer, cfg, run, stop)
            accuracy, dev_loss, guess = evaluate(model, dev, stop)
        except Stopped:
            run["seconds"] = time.time() - began
            save_checkpoint(model, optimizer, run, folder)
            raise
        record(run, model, cfg, loss, dev_loss, float(np.mean(guess == dev.labels.cpu().numpy()) * 100))
        run["seconds"] = time.time() - began
        save_checkpoint(model, optimizer, run, folder)
        print_row(run, cfg, dev, guess)
    copy_into(model, run["best"])
    return run


def record(run, model, cfg, loss, dev_loss, dev_accuracy):
    """Note an evaluation: the best accuracy is kept, ties go to the earlier; patience watches the dev loss."""
    curve = run["curve"]
    if not curve or dev_accuracy > max(c["dev_accuracy"] for c in curve):
        run["best"] = {name: t.clone() for name, t in trainable(model).items()}
    if 2 * run["step"] >= cfg.steps:               # PAPER 4.4: after the first cycle; AUTHORS: from half-time on
        run["waited"] = 0 if not curve or dev_loss < min(c["dev_loss"] for c in curve) else run["waited"] + 1
    curve.append(dict(epoch=len(curve) + 1, step=run["step"], lr=cfg.lr * run["factor"], loss=loss,
                      dev_loss=dev_loss, dev_accuracy=dev_accuracy))
    run["losses"] = None


def print_row(run, cfg, dev, guess):
    """One row of the log, and a warning where every dev sentence got the same class."""
    c, majority = run["curve"][-1], 100 * torch.bincount(dev.labels).max().item() / len(dev.labels)
    left = run["seconds"] * (cfg.steps / max(1, run["step"]) - 1)
    print(f"{c['epoch']:5d} {c['step']:7d} {c['loss']:6.3f} {c['dev_loss']:10.3f} {c['dev_accuracy']:9.1f}%"
          f" {majority:9.1f}% {c['lr']:8.1e} {run['seconds']:9.0f} {left:8.0f}", flush=True)
    if len(set(guess.tolist())) == 1:
        print("      warning: every dev sentence is predicted as one class; more steps or other rates may help")


# ----------------------------------------------------------------------------------------------------------
# The run folder: whatever happens, a file there is whole, and an epoch is the most that can be lost


def write_file(path, write):
    """write(file) into `path` by way of a temporary name, so that `path` is the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path, value):
    """`value` as JSON, atomically."""
    write_file(path, lambda file: file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()))


def save_checkpoint(model, optimizer, run, folder):
    """Everything needed to go on, and log.csv."""
    rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
    state = dict(run=run, model=trainable(model), optimizer=optimizer.state_dict(), rng=rng)
    write_file(folder / "checkpoint.pt", lambda file: torch.save(state, file))
    if run["curve"]:
        rows = [",".join(run["curve"][0])] + [",".join(map(str, c.values())) for c in run["curve"]]
        write_file(folder / "log.csv", lambda file: file.write(("\n".join(rows) + "\n").encode()))


def read_checkpoint(path):
    """The state that save_checkpoint wrote.  Raises InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("run", "model", "optimizer", "rng")}
    except Exception as error:                     # truncated, foreign, or not readable at all
        raise InputError(f"{path}: not a checkpoint of this program ({type(error).__name__}); "
                         "remove it, or choose another --out") from None


def resume(model, optimizer, run, folder):
    """Go on from the folder's checkpoint, if there is one."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return
    state = read_checkpoint(path)
    try:
        copy_into(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
    except (KeyError, ValueError, RuntimeError, TypeError):
        raise InputError(f"{path}: a checkpoint of another model; choose another --out") from None
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    run.update(state["run"])
    device = next(model.parameters()).device
    run["best"] = run["best"] and {name: t.to(device) for name, t in run["best"].items()}
    run["losses"] = run["losses"] if run["losses"] is None else run["losses"].to(device)
    print(f"going on from step {run['step']} ({path})")


def run_name(cfg):
    """dual70-joshi5-s0: what defines a run."""
    share = f"{round(100 * cfg.xpe_ratio)}" if cfg.method == "dual" else ""
    return f"{'toy-' * cfg.toy}{cfg.method}{share}-{cfg.source.replace(',', '+')[:100]}-s{cfg.seed}"


def claim_folder(cfg):
    """The run's folder, and its result if it is finished.  Raises InputError for another config's folder."""
    folder = Path(cfg.out, run_name(cfg))
    mine = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "out"}
    try:
        if (folder / "config.json").exists():
            theirs = json.loads((folder / "config.json").read_text())
            differ = [f"{k} ({theirs.get(k)} there, {v} here)" for k, v in mine.items() if theirs.get(k) != v]
            if differ:
                raise InputError(f"{folder} holds a run with other settings: {', '.join(differ)}; choose another --out")
        if (folder / "result.json").exists():
            return folder, json.loads((folder / "result.json").read_text())
        above = next(p for p in (folder, *folder.parents) if p.exists())
        with tempfile.TemporaryFile(dir=above):    # writable?  Leaves nothing behind.
            return folder, None
    except json.JSONDecodeError:
        raise InputError(f"{folder}: a file there is not JSON; choose another --out") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be used ({error.strerror}); choose another --out") from None


# ----------------------------------------------------------------------------------------------------------
# Adapters: the finished prompt and the head, in the layout that PEFT's PeftModel.from_pretrained loads

HEAD = "base_model.classifier."


def save_adapter(model, folder, base="", facts=None):
    """Write prompt (P, H) and head as a PEFT PROMPT_TUNING adapter; `facts` go into xpe.json beside it.

    Raises ValueError for pool="bos": PEFT's head reads position 0.
    """
    from safetensors.torch import save
    if model.pool == "bos":
        raise ValueError("PEFT's head reads position 0, so a model with pool 'bos' cannot be saved as its adapter")
    model.eval()
    tensors = {"prompt_embeddings": model.prompt(), **{HEAD + k: v for k, v in model.head.state_dict().items()}}
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}
    b = model.backbone.config
    config = dict(peft_type="PROMPT_TUNING", task_type="SEQ_CLS", base_model_name_or_path=base, inference_mode=True,
                  num_virtual_tokens=len(tensors["prompt_embeddings"]), token_dim=b.hidden_size,
                  num_transformer_submodules=1, num_attention_heads=b.num_attention_heads,
                  num_layers=b.num_hidden_layers, modules_to_save=["classifier"], prompt_tuning_init="RANDOM")
    folder = Path(folder)
    write_file(folder / "adapter_model.safetensors", lambda f: f.write(save(tensors, metadata={"format": "pt"})))
    write_json(folder / "adapter_config.json", config)
    write_json(folder / "xpe.json", facts or {})


# ----------------------------------------------------------------------------------------------------------
# Command line


def closest(word, names):
    """The end of an error line: which known names look like `word`."""
    near = difflib.get_close_matches(word, list(names), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(list(names)[:8])}"


CHOICES = dict(method=("spt", "xpe", "dual"), recipe=("paper", "released"), pool=("first", "bos"),
               dtype=("auto", "fp32", "bf16"), backbone_dropout=("on", "off"))
AT_LEAST = dict(steps=0, batch_size=1, prompt_length=1, mlp_hidden=1, max_length=3, cycles=1, patience=1, seed=0,
                lr=0.0, prompt_lr=0.0, clip=0.0, warmup=0.0, dropout=0.0, head_dropout=0.0, weight_decay=0.0)


def check(cfg):
    """Raise InputError for what can be told without loading anything; fill in what depends on other settings."""
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise InputError(f"unknown {name} {getattr(cfg, name)!r}; {closest(getattr(cfg, name), choices)}")
    if cfg.method != "dual" and cfg.xpe_ratio is not None:
        raise InputError(f"--xpe-ratio belongs to --method dual; {cfg.method} has none")
    cfg.xpe_ratio = {"spt": 0.0, "xpe": 1.0, "dual": 0.7 if cfg.xpe_ratio is None else cfg.xpe_ratio}[cfg.method]
    if cfg.method == "dual" and not 0 < cfg.xpe_ratio < 1:
        raise InputError(f"--xpe-ratio {cfg.xpe_ratio}: must lie between 0 and 1 (0 is --method spt, 1 is --method xpe)")
    if cfg.weight_decay is None:
        cfg.weight_decay = 0.01 if cfg.recipe == "released" else 0.1             # PAPER 4.4: 0.1
    for name, least in AT_LEAST.items():
        if not least <= getattr(cfg, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be a number of at least {least}")
    for name in ("warmup", "dropout", "head_dropout"):
        if getattr(cfg, name) >= 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be below 1")
    if cfg.method == "dual" and cfg.prompt_length < 2:
        raise InputError("--prompt-length 1: dual needs at least 2, one standard and one encoded vector")


def pick_device(name):
    """The torch device, or InputError where it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: not on this machine; use cpu or auto") from None


def pick_languages(text, data, codes, split):
    """Codes from a source's name or a list with commas, each checked against what `data` has."""
    wanted = groups.SOURCES.get(text) or (codes if text == "all" else [c.strip() for c in text.split(",")])
    for code in wanted:
        if code not in codes:
            raise InputError(f"unknown language {code!r} in {data}; {closest(code, [*codes, *groups.SOURCES])}")
        if text_folder(data) and not Path(data, code, split + ".tsv").exists():
            raise InputError(f"{Path(data, code, split + '.tsv')}: no such file")
    return list(dict.fromkeys(wanted))


def build(cfg, num_labels, device):
    """(model, tokenizer) of a config, the seed set first."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(
        cfg.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    backbone, tokenizer = load_backbone(cfg.backbone, device, dtype, cfg.backbone_dropout == "on")
    b = backbone.config
    room = b.max_position_embeddings - b.pad_token_id - 1            # XLM-R counts positions from pad_token_id + 1
    if cfg.prompt_length + cfg.max_length > room:
        raise InputError(f"--prompt-length {cfg.prompt_length} + --max-length {cfg.max_length} is more than the "
                         f"{room} positions of {cfg.backbone}")
    torch.manual_seed(cfg.seed)
    prompt = build_prompt(cfg.method, cfg.prompt_length, b.hidden_size, cfg.xpe_ratio,
                          mlp_hidden=cfg.mlp_hidden, dropout=cfg.dropout)
    return PromptedClassifier(backbone, prompt, num_labels, cfg.pool, cfg.head_dropout).to(device), tokenizer


def run(cfg, stop=()):
    """One run, from the config to result.json; a finished run's result is only read."""
    folder, result = claim_folder(cfg)
    if result:
        print(f"{folder} is finished; reported, not repeated")
        return report(result)
    codes = available(cfg.data) if cfg.data != "toy" else list(groups.LANGUAGES)
    if Path(cfg.data).is_absolute() and not Path(cfg.data).is_dir() or cfg.data.startswith((".", "~")) and not \
            Path(cfg.data).is_dir():
        raise InputError(f"--data {cfg.data}: no such folder")
    sources = pick_languages(cfg.source, cfg.data, codes, "train")
    targets = pick_languages(cfg.languages, cfg.data, codes, "test")
    device = pick_device(cfg.device)
    labels = known_labels(cfg.data, sources)
    model, tokenizer = build(cfg, len(labels), device)
    load = lambda codes, split: load_split(cfg.data, codes, split, labels, tokenizer, device, cfg.max_length)
    data, dev, test = load(sources, "train"), load(sources, "dev"), load(targets, "test")
    n, whole = sum(t.numel() for t in trainable(model).values()), sum(p.numel() for p in model.parameters())
    print(f"{folder}: {cfg.method}, {len(sources)} source languages, {len(data.lengths)} sentences, {len(labels)} labels; "
          f"{n:,} of {whole:,} parameters are trained ({100 * n / whole:.2f} %); {device}, {cfg.backbone}")
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", dataclasses.asdict(cfg))
    record = train(model, data, dev, cfg, folder, stop)
    accuracy = evaluate(model.cache_prompt(), test, stop)[0]
    best = max(c["dev_accuracy"] for c in record["curve"])
    if cfg.pool == "first":
        save_adapter(model, folder / "adapter", cfg.backbone, dict(
            method=cfg.method, xpe_ratio=cfg.xpe_ratio, labels=labels, languages=sources, dev_accuracy=best))
    import transformers
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)
    result = dict(config=dataclasses.asdict(cfg), versions=versions, seconds=round(record["seconds"], 1),
                  trainable_parameters=n, dev_accuracy=best, accuracy=accuracy,
                  groups=groups.group_means(accuracy), dev_curve=record["curve"])
    write_json(folder / "result.json", result)
    return report(result)


def report(result):
    """Print accuracy per language and per target group."""
    cells = [f"{code} {percent:5.1f}" for code, percent in sorted(result["accuracy"].items())]
    for at in range(0, len(cells), 6):
        print("  ".join(cells[at:at + 6]))
    print(f"\ndev accuracy {result['dev_accuracy']:.1f}%, {result['seconds']:.0f} s of training")
    for name, percent in result["groups"].items():
        inside = sum(code in result["accuracy"] for code in groups.TARGET_GROUPS[name])
        print(f"{name:<18} {inside:4d} languages {percent:6.1f}%")
    if result["config"]["toy"]:
        print("These are synthetic languages: the numbers mean nothing about real ones.")
    return result


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an InputError like any other: one line."""

    def error(self, message):
        raise InputError(message)


def parse(argv):
    """The command line as a Config; --toy changes defaults, so what is given beside it still counts."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(Config):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            shown = "" if field.default is None else f" [{field.default}]"
            parser.add_argument(flag, type=field.type, default=field.default, help=text + shown, metavar="X")
    if parser.parse_args(argv).toy:
        parser.set_defaults(**TOY)
    return Config(**vars(parser.parse_args(argv)))


def main(argv=None):
    """The command line; -> exit code: 0 done, 1 the run failed, 2 wrong input, 128 + signal when stopped."""
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    try:
        cfg = parse(argv)
        check(cfg)
        run(cfg, stop)
    except InputError as error:
        print(f"xpe.py: {error}", file=sys.stderr)
        return 2
    except Stopped:
        print("xpe.py: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stop[0]
    except (NonFinite, OSError) as error:
        print(f"xpe.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
