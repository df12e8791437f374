# SPDX-License-Identifier: MIT
"""Cross-Prompt Encoder (XPE): soft prompts for languages an encoder hardly knows.

A minimal, pure-PyTorch, single-file reference implementation of "Cross-Prompt
Encoder for Low-Performing Languages" (Mikaberidze, Saghinadze, Ostermann,
Müller; Findings of IJCNLP-AACL 2025).  A few trained vectors stand in front of
a frozen XLM-R, which then classifies topics (SIB-200) in languages that it was
never trained on:

    python xpe.py --toy                           # offline, synthetic languages
    python xpe.py --method dual --xpe-ratio 0.7   # a run of the paper's Table 1
    python xpe.py --backbone DIR --data DIR       # a local encoder, local files

In low-performing languages the toy ends at 39.9 %, which means nothing about
real ones; for the second command the paper has 37.3 %, a mean of ten seeds.
Not in here: other tasks than text classification, decoders, several GPUs.

Part I is the method, from the prompt to whole runs; Part II makes it fast, safe
and convenient.  Letters: B batch, T text length, P prompt length, H hidden size
(the paper's d), C classes.  Numbers like (4.4) are the paper's sections.  The
tags `PAPER section:` and `AUTHORS:` (their released program) stand where the
paper is silent, or where the two differ.
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
import timeit
from pathlib import Path
from typing import NamedTuple

import groups  # before torch, so that Ctrl-C is answered while torch is loaded: see its last lines
from groups import InputError

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ==================================================================================================
# Part I: the method.  Whoever stops at its end has read all that the paper says of it; which
# languages are in its groups (4.2) stands in groups.py.
# ==================================================================================================


# ------------------------------------------------------------------------------------- The prompts
# Sections 3.1 and 3.2, and the classifier around them.  To copy it alone: `import torch`, `from
# torch import nn`, `from torch.nn import functional as F`.

# The share of the prompt that is encoded.  DUAL-30 is dual with 0.3; full, the baseline that trains
# the backbone itself, has a prompt of length 0.
SHARES = {"spt": 0.0, "dual": 0.7, "xpe": 1.0, "full": 0.0}
POOLS = {  # what the head reads of the states (B, P + T, H) and their mask (B, P + T) -> (B, H)
    "first": lambda states, mask, P: states[:, 0],         # AUTHORS: like PEFT, a virtual token
    "bos": lambda states, mask, P: states[:, P],           # <s>, the first token of the text
}


def for_batch(prompt, batch_size):
    """A prompt (P, H) as it is, or once for each example of a batch (B, P, H)."""
    return prompt if batch_size is None else prompt.expand(batch_size, -1, -1)


class SoftPrompt(nn.Module):
    """SPT (4.3): `length` free vectors.  forward() -> (P, H), or (B, P, H)."""

    def __init__(self, length, hidden):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(length, hidden))           # AUTHORS: N(0, 1)

    def forward(self, batch_size=None):
        return for_batch(self.vectors, batch_size)                         # (B, P, H)


class CrossPromptEncoder(nn.Module):
    """XPE (3.1): a pseudo prompt, each vector of which goes through one small MLP.

    forward() -> (P, H), or for a batch (B, P, H).
    """

    def __init__(self, length, hidden, mlp_hidden=256, dropout=0.1):
        super().__init__()
        self.pseudo_prompt = nn.Parameter(torch.randn(length, hidden))     # AUTHORS: N(0, 1)
        self.mlp = nn.Sequential(            # AUTHORS: three Linears
            nn.Linear(hidden, mlp_hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_hidden, mlp_hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_hidden, hidden),
        )

    def forward(self, batch_size=None):
        if self.training:                          # AUTHORS: a dropout mask for each example
            return self.mlp(for_batch(self.pseudo_prompt, batch_size))     # (B, P, H)
        return for_batch(self.mlp(self.pseudo_prompt), batch_size)         # encoded once


class DualPrompt(nn.Module):
    """DUAL (3.2): standard part first, encoded part second.  forward() -> (P, H), or (B, P, H)."""

    def __init__(self, standard, encoded):
        super().__init__()
        self.standard = standard
        self.encoded = encoded

    def forward(self, batch_size=None):
        parts = self.standard(batch_size), self.encoded(batch_size)
        return torch.cat(parts, dim=-2)                                    # (B, P, H)


def build_prompt(method, length, hidden, ratio=0.7, **prompt_encoder):
    """The prompt of a method, `length` vectors (P, H), of which DUAL encodes the share `ratio`.

    `prompt_encoder` goes to CrossPromptEncoder (mlp_hidden, dropout).  Raises KeyError for an
    unknown method, ValueError where DUAL has no room for a vector of each kind.
    """
    shares = SHARES | {"dual": ratio}
    encoded = int(length * shares[method])         # AUTHORS: rounded down
    if method == "dual":
        if length < 2 or not 0 < ratio < 1:
            raise ValueError("a dual prompt needs two vectors or more, and a ratio in (0, 1)")
        encoded = min(max(encoded, 1), length - 1)
    return prompt_of(length - encoded, encoded, hidden, **prompt_encoder)


def prompt_of(free, encoded, hidden, **prompt_encoder):
    """A prompt of `free` free vectors, then `encoded` encoded ones."""
    if encoded == 0:
        return SoftPrompt(free, hidden)
    cross = CrossPromptEncoder(encoded, hidden, **prompt_encoder)
    return DualPrompt(SoftPrompt(free, hidden), cross) if free else cross


class ClassificationHead(nn.Module):
    """XLM-R's head: dropout, Linear, tanh, dropout, Linear, (B, H) -> (B, C).  Init N(0, 0.02)."""

    def __init__(self, hidden, num_labels, dropout=0.1):
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, num_labels)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.dense, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        x = torch.tanh(self.dense(self.dropout(x)))                        # (B, H)
        return self.out_proj(self.dropout(x))                              # (B, C)


class PromptedClassifier(nn.Module):
    """A frozen backbone that reads [prompt | <s> text </s>], and a head on one of its positions."""

    def __init__(self, backbone, prompt, num_labels, pool="first", head_dropout=0.1):
        super().__init__()
        self.backbone = backbone
        self.prompt = prompt
        self.pool = pool
        self.head = ClassificationHead(backbone.config.hidden_size, num_labels, head_dropout)

    def forward(self, input_ids, attention_mask):
        """(B, T) token ids, and 1 on text, 0 on right padding -> logits (B, C), fp32."""
        words = self.backbone.get_input_embeddings()(input_ids)            # (B, T, H)
        prompt = self.prompt(len(words)).to(words.dtype)                   # (B, P, H)
        P = prompt.shape[1]
        x = torch.cat([prompt, words], dim=1)                              # (B, P + T, H)
        mask = F.pad(attention_mask, (P, 0), value=1)    # (B, P + T)

        # The backbone adds positions, counted through prompt and text, and applies its LayerNorm.
        states = self.backbone(inputs_embeds=x, attention_mask=mask).last_hidden_state
        pooled = POOLS[self.pool](states, mask, P)                         # (B, H)
        return self.head(pooled.float())                                   # (B, C)

    def cache_prompt(self):
        """Keep only the finished prompt (3.1): inference needs neither MLP nor pseudo prompt."""
        finished = self.eval().prompt().detach().clone()                   # (P, H)
        self.prompt = SoftPrompt(*finished.shape)
        self.prompt.vectors = nn.Parameter(finished, requires_grad=False)
        return self


# -------------------------------------------------------------------------- Optimizer and schedule
# Section 4.4.  Needs only `import math` and `import torch`: copy it alone.

class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern, 2018) with a given learning rate and without momentum.

    Of the running average V of the squared gradient (R, S) only the means of its rows and columns
    are kept, R + S numbers: V ~ row col^T / mean(row).  Tensors of one dimension keep V whole.
    The update G / sqrt(V) is clipped to RMS `clip_threshold`; decay is decoupled.  For parameters
    in fp32.  Equal to transformers' with scale_parameter, relative_step and warmup_init off.
    """

    def __init__(self, params, lr, weight_decay=0.0, clip_threshold=1.0, decay_rate=-0.8,
                 eps=1e-30):
        defaults = dict(lr=lr, weight_decay=weight_decay, clip_threshold=clip_threshold,
                        decay_rate=decay_rate, eps=eps)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; -> the loss, if a closure computes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = self.normalized(p.grad, self.state[p], group)
                p.add_(p, alpha=-group["lr"] * group["weight_decay"])
                p.sub_(update * group["lr"])
        return loss

    def normalized(self, g, state, group):
        """A gradient over the root of its average square, clipped; advances the averages."""
        state["step"] = state.get("step", 0) + 1
        beta2 = 1 - state["step"] ** group["decay_rate"]   # 0 at the first step: no history yet
        square = g * g + group["eps"]

        def average(name, new):
            state[name] = torch.lerp(new, state.get(name, new), beta2)
            return state[name]

        if g.dim() < 2:
            u = g * average("v", square).rsqrt()
        else:
            row = average("row", square.mean(dim=-1))                      # (R,)
            col = average("col", square.mean(dim=-2))                      # (S,)
            row = row / row.mean(dim=-1, keepdim=True)
            u = g * row.rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)  # (R, S)
        rms = u.square().mean().sqrt()
        return u / (rms / group["clip_threshold"]).clamp(min=1.0)


def cosine_with_restarts(step, warmup, total, cycles=2):
    """Factor in [0, 1] on the learning rate: linear warm-up, then `cycles` cosines from 1 to 0."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


# ---------------------------------------------------------------------------------- Configuration

def setting(default, text, **facts):
    """A field of Config: `text` (unit, section) is its help; numbers lie in [least, below).

    The field starts as None, and check_settings fills in its default (with --toy, `toy`), so that
    a value that was given can be told from a default.  defines: is it part of a run's identity?
    """
    usual = dict(text=text, default=default, toy=default, choices=(), least=0, below=2**40,
                 defines=True)
    return dataclasses.field(default=None, metadata=usual | facts)


@dataclasses.dataclass
class Config:
    """Everything about a run.  The command line is made from it: `prompt_lr` is `--prompt-lr`.

    Defaults that depend on method, recipe or toy are filled in when it is made: to change one of
    these make a new Config, instead of dataclasses.replace.  Raises InputError for a value out of
    bounds, and for values that contradict each other.
    """

    # The method
    method: str = setting("dual", "spt, xpe, dual (3), or full: fine-tune all", choices=SHARES)
    xpe_ratio: float = setting(None, "encoded share of a dual prompt, in (0, 1) [0.7] (4.3)")
    prompt_length: int = setting(None, "virtual tokens P [20] (4.4)")
    mlp_hidden: int = setting(256, "width of the prompt encoder (AUTHORS)", least=1)
    dropout: float = setting(0.1, "dropout in the prompt encoder (AUTHORS)", below=1)
    head_dropout: float = setting(0.1, "dropout in the classification head", below=1)
    pool: str = setting("first", "the head reads first: a virtual token, or bos: <s>",
                        choices=POOLS)
    backbone: str = setting("FacebookAI/xlm-roberta-large", "encoder: hub name or folder (4.1)",
                            toy="toy")

    # The languages
    source: str = setting("joshi5", "train on enarzho, joshi5, seen, or codes: a,b (4.2)")
    languages: str = setting("all", "test on all, or on names and codes as in --source")
    target: str = setting("", "then go on in each alone (4.1): codes, or full: the 46 (4.2)")
    data: str = setting("Davlan/sib200", "hub name, or DIR of <code>/{train,dev,test}.tsv (4.1)",
                        toy="toy")
    max_length: int = setting(164, "longest text in tokens (AUTHORS)", toy=32, least=3)

    # The training
    steps: int = setting(24_000, "optimization steps (4.4)", toy=300)
    batch_size: int = setting(32, "sentences per step (4.4)", least=1)
    lr: float = setting(5e-5, "peak learning rate of prompt encoder and head (4.4)", toy=3e-3)
    prompt_lr: float = setting(5e-3, "peak learning rate of the free vectors (4.4); if released, "
                               "of the pseudo prompt, and of SPT", toy=5e-2)
    weight_decay: float = setting(None, "of prompt encoder and head [0.1; 0.01 if released] (4.4)")
    warmup: float = setting(0.1, "share of steps with warm-up (AUTHORS)", below=1)
    cycles: int = setting(2, "cosine cycles, each from the peak to zero (4.4)", least=1)
    clip: float = setting(1.0, "largest global norm of the gradient (AUTHORS)",
                          least=1e-6)
    patience: int = setting(20, "epochs without a better dev loss (4.4), from half-time (AUTHORS)",
                            least=1)
    recipe: str = setting("paper", "paper, or released: as in the authors' program",
                          choices=("paper", "released"))
    backbone_dropout: str = setting("on", "the frozen backbone's own dropout: on or off",
                                    choices=("on", "off"))
    init_from: str = setting("", "start from a run, or from an adapter (--method spt)")

    # The training on each language of --target: these take the place of those above
    target_steps: int = setting(6_000, "--steps there (4.4)", toy=75, defines=False)
    target_warmup: float = setting(0.05, "--warmup there (AUTHORS)", below=1,
                                   defines=False)
    target_dropout: float = setting(0.0, "--dropout there (AUTHORS)", below=1,
                                    defines=False)
    target_patience: int = setting(30, "--patience there (4.4)", least=1, defines=False)

    # The run
    seed: int = setting(0, "random seed; the paper averages 10 (4.3)")
    out: str = setting("runs", "folder that holds one folder per run", defines=False)
    device: str = setting("auto", "cpu, cuda, cuda:1, ..., auto: cuda where there is one",
                          defines=False)
    dtype: str = setting("auto", "frozen weights: fp32, bf16; auto: bf16 on a GPU that has it",
                         choices=("auto", "fp32", "bf16"))
    toy: bool = setting(False, "synthetic languages, a tiny random encoder, no network")

    # Instead of training
    load: str = setting("", "test the adapter in this folder, or --predict with it",
                        defines=False)
    predict: str = setting("", "with --load: label each line of a file (-: stdin)",
                           defines=False)
    labels: str = setting("", "names of the adapter's classes, if it has none: a,b",
                          defines=False)
    benchmark: bool = setting(False, "time a training step and the evaluation", defines=False)

    def __post_init__(self):
        check_settings(self)


# --------------------------------------------------------------------------- Sentences and batches

class Sentences(NamedTuple):
    """Tokenized sentences of one or more languages, whole on the device: 300 MB at most."""
    ids: torch.Tensor             # (N, L) token ids, right-padded
    mask: torch.Tensor            # (N, L) 1 on tokens, 0 on padding
    classes: torch.Tensor         # (N,) class numbers
    lengths: np.ndarray           # (N,) tokens, on the CPU: a width waits for no GPU
    languages: np.ndarray         # (N,) codes

    def batch(self, indices):
        """Sentences (B,) -> ids (B, T), mask (B, T), classes (B,); T is a multiple of 4."""
        T = -(-self.lengths[indices].max() // 4) * 4
        indices = torch.as_tensor(indices).to(self.ids.device, non_blocking=True)
        return self.ids[indices, :T], self.mask[indices, :T], self.classes[indices]


def tokenize(examples, labels, tokenizer, device="cpu", max_length=164):
    """[Example] as Sentences; a class is the place of its label in `labels`."""
    texts = [example.text for example in examples]
    tokens = tokenizer(texts, truncation=True, max_length=max_length, padding=True,
                       return_attention_mask=True, return_tensors="pt")
    lengths = tokens["attention_mask"].sum(1).numpy()
    tokens = tokens.to(device)
    classes = torch.tensor([labels.index(example.label) for example in examples], device=device)
    languages = np.array([example.code for example in examples])
    return Sentences(tokens["input_ids"], tokens["attention_mask"], classes, lengths, languages)


def epoch_batches(lengths, size, seed, epoch):
    """Indices (B,) of each batch, similar lengths together (AUTHORS); decided by seed and epoch."""
    rng = np.random.default_rng((seed, epoch))
    indices = rng.permutation(len(lengths))
    batches_a_pool = min(50, max(1, len(indices) // (4 * size)))   # AUTHORS: as in transformers
    pool = np.arange(len(indices)) // (size * batches_a_pool)
    indices = indices[np.lexsort((-lengths[indices], pool))]       # by length within each pool
    batches = [indices[at:at + size] for at in range(0, len(indices), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(lengths, prompt_length, positions=4096):
    """Indices (B,) of each batch, the longest sentences first; all hold about as many `positions`,
    prompt and padding included, and so take about as long."""
    indices = np.argsort(-lengths, kind="stable")
    batches = []
    while len(indices):
        size = max(1, positions // (lengths[indices[0]] + prompt_length))
        batches.append(indices[:size])
        indices = indices[size:]
    return batches


# ------------------------------------------------------------------------- Training and evaluation

def loss_of(logits, classes):
    """The mean cross-entropy of logits (B, C)."""
    return F.cross_entropy(logits, classes)


@torch.no_grad()
def predict(model, sentences, title=""):
    """Logits (N, C) of all sentences, in their order; on a terminal a bar with this title."""
    model.eval()
    batches = evaluation_batches(sentences.lengths, len(model.prompt()))
    parts = []
    for indices in progress_bar(title, batches):
        ids, mask, _ = sentences.batch(indices)
        with fast(model):                          # the same results, sooner: see Speed
            parts.append(model(ids, mask))                                 # (B, C)
    order = np.argsort(np.concatenate(batches))
    logits = torch.cat(parts)[order]
    check_finite(logits.abs().max().item(), f"{title or 'the lines'}: a logit")
    return logits


def evaluate(model, sentences, title="test"):
    """({code: accuracy in percent}, mean loss, predicted classes (N,)) on Sentences."""
    codes = np.unique(sentences.languages).tolist()
    logits = predict(model, sentences, f"{title}: {len(codes)} language{'s' * (len(codes) > 1)}")
    loss = loss_of(logits, sentences.classes).item()
    predicted = logits.argmax(-1).cpu().numpy()
    right = predicted == sentences.classes.cpu().numpy()
    accuracy = {code: float(100 * right[sentences.languages == code].mean()) for code in codes}
    return accuracy, loss, predicted


def rate_and_decay(module, parameter, cfg):
    """Peak learning rate and weight decay of a parameter that `module` itself owns (4.4)."""
    released = cfg.recipe == "released"
    slow = released and cfg.method == "dual"       # AUTHORS: free vectors like all the rest
    if isinstance(module, SoftPrompt) and not slow:
        return cfg.prompt_lr, 0.0                  # PAPER 4.4: 5e-3 and no decay, always
    if released and isinstance(module, CrossPromptEncoder):
        return cfg.prompt_lr, 0.0                  # AUTHORS: the pseudo prompt moves fast
    if released and parameter.dim() == 1:
        return cfg.lr, 0.0                         # AUTHORS: no decay on biases
    return cfg.lr, cfg.weight_decay                # PAPER 4.4, which is silent on the pseudo prompt


def parameter_groups(model, cfg):
    """What is trained, for an optimizer: parameters with equal rate and decay together."""
    found = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                found.setdefault(rate_and_decay(module, parameter, cfg), []).append(parameter)
    return [dict(params=parameters, lr=lr, peak=lr, weight_decay=decay)
            for (lr, decay), parameters in found.items()]


def set_rates(optimizer, step, cfg):
    """Set the learning rates of `step`, from 0; -> that of prompt encoder and head."""
    warmup = math.ceil(cfg.warmup * cfg.steps)
    factor = cosine_with_restarts(step, warmup, cfg.steps, cfg.cycles)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return cfg.lr * factor


def set_training_mode(model, cfg):
    """Dropout on, by default in the frozen backbone too (AUTHORS)."""
    model.train()
    model.backbone.train(cfg.backbone_dropout == "on")


def train_step(model, batch, optimizer, clip):
    """One update on a batch of Sentences; -> its loss, still on the device."""
    ids, mask, classes = batch
    with fast(model):
        loss = loss_of(model(ids, mask), classes)
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def trainable(model):
    """{name: tensor} of what is trained; the frozen backbone is not in it."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def copy_into(model, tensors):
    """Write {name: tensor} into what is trained; KeyError or RuntimeError on a misfit."""
    for name, p in trainable(model).items():
        p.copy_(tensors[name].view(p.shape))       # view: no broadcasting


@dataclasses.dataclass
class Progress:
    """How far a training has come."""
    step: int = 0
    seconds: float = 0.0                           # of training and of evaluation on dev
    curve: list = dataclasses.field(default_factory=list)      # a dict an epoch
    best: dict = None                              # {name: tensor}: what is trained, at its best

    def finished(self, cfg):
        """All steps are made, or the dev loss has not fallen for so many epochs (4.4)."""
        # PAPER 4.4: after the first cycle.  AUTHORS, and here: epochs from half of the steps on
        late = [epoch["dev_loss"] for epoch in self.curve if epoch["step"] >= cfg.steps // 2]
        waited = len(late) - 1 - late.index(min(late)) if late else 0
        return bool(self.curve) and (self.step >= cfg.steps or waited >= cfg.patience)

    def record(self, epoch, model):
        """Note an epoch; the model with the best dev accuracy is kept, the earlier of equals."""
        # AUTHORS: by accuracy, where patience counts by loss
        if all(epoch["dev_accuracy"] > other["dev_accuracy"] for other in self.curve):
            self.best = {name: tensor.clone() for name, tensor in trainable(model).items()}
        self.curve.append(epoch)


def check_finite(number, what):
    """Raise a FloatingPointError that says what is not finite."""
    if not math.isfinite(number):
        raise FloatingPointError(f"{what} is {number}; what a run has written is kept")


def losses_of_epoch(losses, batches, sentences, step):
    """The losses of an epoch that ended at `step`, as floats; here the host waits for the device.

    Raises FloatingPointError that names the step and its languages.
    """
    losses = [loss.item() for loss in losses]
    first = step - len(losses) + 1
    for number, (loss, indices) in enumerate(zip(losses, batches), first):
        languages = ", ".join(np.unique(sentences.languages[indices]))
        check_finite(loss, f"step {number}: the loss on {languages}")
    return losses


def train(model, sentences, dev, cfg, folder=None, test_tokens=0):
    """Train on Sentences, keep what is best on the Sentences `dev`; -> Progress.

    An evaluation and a checkpoint in `folder` (a RunFolder) end each epoch; from a checkpoint that
    is there it goes on, on a CPU bit for bit.  test_tokens: how many are tested later, for the
    estimate of the time left.  Raises FloatingPointError where a loss is not finite.
    """
    optimizer = Adafactor(parameter_groups(model, cfg), cfg.lr)
    progress = folder.resume(model, optimizer) if folder else Progress()
    log = Log(cfg, progress, test_tokens / dev.lengths.sum())
    began = time.monotonic() - progress.seconds
    classes = dev.classes.cpu().numpy()
    rate = 0.0

    while not progress.finished(cfg):
        epoch = len(progress.curve)
        batches = epoch_batches(sentences.lengths, cfg.batch_size, cfg.seed, epoch)
        losses = []

        set_training_mode(model, cfg)
        for indices in batches[:cfg.steps - progress.step]:
            rate = set_rates(optimizer, progress.step, cfg)
            losses.append(train_step(model, sentences.batch(indices), optimizer, cfg.clip))
            progress.step += 1
            log.step(losses[-1], rate)
        losses = losses_of_epoch(losses, batches, sentences, progress.step)

        _, dev_loss, predicted = evaluate(model, dev, "dev")
        progress.seconds = time.monotonic() - began
        progress.record(dict(
            epoch=epoch + 1, step=progress.step, loss=sum(losses) / max(1, len(losses)),
            dev_loss=dev_loss, lr=rate, dev_accuracy=float(100 * np.mean(predicted == classes)),
        ), model)
        if folder:
            folder.save_checkpoint(model, optimizer, progress)
        log.epoch(progress, len(set(predicted)))

    log.bar.close()
    copy_into(model, progress.best)
    return progress


# -------------------------------------------------------------------------------------------- Runs

def run(cfg, wait=False):
    """One run, from its config to result.json; -> the result.  A finished run is only reported.

    wait: where another process is at work on the same run, wait for it; else InputError.
    """
    # The config that transfer makes for one target passes: of it transfer would make itself.
    refuse({"a run on a target starts from another: call transfer(cfg)":
            cfg.target and [cfg] != configs_of_transfer(cfg)})
    print(f"{run_name(cfg)}: reading the sentences")
    task = read_task(cfg)
    folder = RunFolder(cfg, task)
    if folder.result():
        print(f"{folder.path} is finished: reported, not repeated")
    else:
        print(f"loading {cfg.backbone}")
        model, tokenizer = build_model(cfg, task.labels)
        with folder.lock(wait):
            if not folder.result():                # another process may just have finished it
                train_and_test(model, tokenizer, cfg, task, folder)
    folder.tidy()
    groups.print_result(folder.result())
    return folder.result()


def train_and_test(model, tokenizer, cfg, task, folder):
    """The run itself: train on the sources, test in every language, leave the result."""
    sentences, dev, test = (
        tokenize(examples, task.labels, tokenizer, cfg.device, cfg.max_length)
        for examples in (task.train, task.dev, task.test))
    trained = sum(p.numel() for p in trainable(model).values())
    share = trained / sum(p.numel() for p in model.parameters())
    most = dev.classes.bincount().max() / len(task.dev)
    print(f"{trained:,} parameters train ({share:.2%}) on {len(task.train):,} sentences of "
          f"{len(task.labels)} classes, the most frequent {most:.1%} of dev; {cfg.dtype}, "
          f"{cfg.device}")

    progress = train(model, sentences, dev, cfg, folder, test.lengths.sum())
    model.cache_prompt()
    accuracy, _, predicted = evaluate(model, test)

    folder.save_result(model, task, predicted, dict(
        seconds=progress.seconds,
        trainable_parameters=trained,
        dev_accuracy=max(epoch["dev_accuracy"] for epoch in progress.curve),
        accuracy=accuracy,
        groups=groups.group_means(accuracy),
        dev_curve=progress.curve,
    ))


def transfer(cfg):
    """Sequential transfer (4.1): a source run, then each target alone, from its prompt and head.

    On the targets target_steps, target_warmup, ... take the place of steps, warmup, ..., which
    only the source run reads, as it does `languages`; with init_from no source is run.
    """
    # All that the targets need is read before the source run, which takes long.
    read_task(dataclasses.replace(cfg, languages=cfg.target))
    for one in configs_of_transfer(cfg):
        run(one, wait=not one.target)


def configs_of_transfer(cfg):
    """The configs of its runs: the source's, unless there is a start, and each target's."""
    source = dataclasses.replace(cfg, target="")
    start = cfg.init_from or Path(cfg.out, run_name(source))
    targets = [
        dataclasses.replace(cfg, target=code, languages=code, init_from=start,
                            steps=cfg.target_steps, warmup=cfg.target_warmup,
                            dropout=cfg.target_dropout, patience=cfg.target_patience)
        for code in codes_of(cfg.target, cfg.data)]
    return targets if cfg.init_from else [source, *targets]


# ==================================================================================================
# Part II: what makes it fast, safe and convenient.  The method is understood without it.
# ==================================================================================================


# ------------------------------------------------------------------------------------------- Speed

LIKE_XLM_R = ("bert", "camembert", "roberta", "xlm-roberta")       # layers that FastOnCPU knows


def fast(model):
    """A context in which a model computes the same in less time, dropout with other masks."""
    on_cpu = model.backbone.device.type == "cpu"
    return FastOnCPU(model) if on_cpu else contextlib.nullcontext()


class FastOnCPU(torch.overrides.TorchFunctionMode):
    """Saves the last layer's unread positions, and most of the random numbers of dropout.

    Behind its attention the last layer goes on with position 0 alone where only that is read.
    A mode of torch holds for one thread and registers nothing, so that models can share a backbone.
    """

    def __init__(self, model):
        super().__init__()
        self.cutting = []                          # ids of the weights that see position 0 alone
        if model.pool == "first" and model.backbone.config.model_type in LIKE_XLM_R:
            behind = model.backbone.encoder.layer[-1].attention.output
            self.cutting = [id(behind.dense.weight), id(behind.LayerNorm.weight)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            return fast_dropout(*args, **kwargs)
        weight = args[1] if function is F.linear else kwargs.get("weight")
        if id(weight) in self.cutting:
            args = (args[0][:, :1], *args[1:])                 # (B, P + T, H) -> (B, 1, H)
        return function(*args, **kwargs)


def fast_dropout(x, p=0.5, training=True, inplace=False):
    """Dropout that cuts the masks of four elements from one random number, with p to 16 bits.

    One number for each element, as torch draws them, takes a quarter of a training step in bf16.
    """
    if not training or p == 0:
        return x
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
    lanes = numbers.view(torch.int16)[:x.numel()].view(x.shape)
    keep = lanes >= round(65536 * p) - 32768
    return x * keep.to(x.dtype).div_(1 - p)


# --------------------------------------------------------------------------------- What is printed

def progress_bar(title, things=None, **counts):
    """A bar over things, drawn once a second; none without a title, or where there is no terminal.

    The time left is by the mean speed, and so counts what comes between the steps.
    """
    return tqdm(things, leave=False, disable=None if title else True, dynamic_ncols=True,
                miniters=1, mininterval=1, smoothing=0,
                bar_format=title + " |{bar}| {elapsed}, left {remaining}{postfix}", **counts)


class Log:
    """What a person sees of a training: a row an epoch, and on a terminal a bar over all steps."""

    HEADER = "epoch   step   loss dev loss dev acc.      lr seconds   left then test"
    ROW = ("{epoch:5d} {step:6d} {loss:6.3f} {dev_loss:8.3f} {dev_accuracy:7.1f}% "
           "{lr:7.1e} {seconds:7.0f} {left:6.0f} {test:9.0f}")
    WARNING = "\n      warning: all of dev is predicted as one class; more steps or other rates?"

    def __init__(self, cfg, progress, test_share):
        self.test_share = test_share               # tokens to be tested later, of dev's
        self.curve = progress.curve
        self.last_step = time.monotonic()
        print(self.HEADER)
        self.bar = progress_bar("step {n}/{total}", total=cfg.steps, initial=progress.step)

    def step(self, loss, rate):
        """After each step; where the bar is drawn, the device is waited for."""
        self.last_step = time.monotonic()
        if self.bar.update():
            dev = "".join(" dev {dev_accuracy:.1f}%".format(**row) for row in self.curve[-1:])
            self.bar.set_postfix_str(f"loss {loss.item():.3f} lr {rate:.1e}{dev}")

    def epoch(self, progress, classes):
        """After each epoch; `classes`: how many of them were predicted on dev."""
        left = progress.seconds * (self.bar.total / max(1, progress.step) - 1)
        test = (time.monotonic() - self.last_step) * self.test_share
        line = self.ROW.format(**self.curve[-1], seconds=progress.seconds, left=left, test=test)
        if classes == 1:
            line += self.WARNING
        tqdm.write(line, file=sys.stdout)


# ------------------------------------------------------------------------------------------- Files

@contextlib.contextmanager
def as_input_error(problem, remedy=""):
    """Turn what a library raises inside into an InputError: problem (its first line), remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:                     # of many kinds, which mean the same to a user
        if lacks_memory(error):                    # but this: no input is wrong
            raise
        raise InputError(f"{problem} ({describe(error)}){remedy}") from error


def lacks_memory(error):
    """Is it one of the ways in which Python, torch and the system say so?"""
    says = "out of memory", "allocate memory"
    return isinstance(error, MemoryError) or any(words in str(error) for words in says)


def describe(error):
    """The first line of an error, and its kind."""
    reason, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {reason[:200]}"


def write_file(path, content):
    """Bytes or text into a Path by way of a temporary name: it is the old file or the new one."""
    temporary = path.with_name(path.name + ".new")
    content = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)          # it would keep a full disk full
        raise OSError(f"cannot write {path} ({describe(error)})") from error


def csv_text(rows):
    """[dict] as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------------------- The run folder

def definition(cfg):
    """{setting: value} of what defines a run, and nothing else: its files keep just this.

    --init-from is kept relative to --out, so that both folders can move together.
    """
    kept = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)
            if field.metadata["defines"]}
    if cfg.init_from:
        start, out = map(os.path.realpath, (cfg.init_from, cfg.out))
        kept["init_from"] = os.path.relpath(start, out)
    return kept


def run_name(cfg):
    """The name of a run's folder, such as dual70-joshi5-s0 or toy-xpe-eng_Latn-kab_Latn-s1."""
    share = f"{100 * cfg.xpe_ratio:g}" if cfg.method == "dual" else ""
    kind = "toy" if cfg.toy else ""
    parts = [kind, f"{cfg.method}{share}", cfg.source[:100], cfg.target[:100], f"s{cfg.seed}"]
    return "-".join(part for part in parts if part).replace(",", "+")


class RunFolder:
    """The folder of one run.  What another run left in it is refused with an InputError."""

    def __init__(self, cfg, task):
        self.path = Path(cfg.out, run_name(cfg))
        self.made_from = dict(config=definition(cfg), digests=task.digests)
        if self.result():
            return
        above = self.path
        while not os.path.lexists(above):
            above = above.parent
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise InputError(f"--out {cfg.out}: {above} is no folder that can be written to")
        self.checkpoint()                          # another run's is refused before anything slow

    @contextlib.contextmanager
    def lock(self, wait=False):
        """One process at a time; the operating system drops the lock with the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / "lock", timeout=-1 if wait else 1):
                try:
                    yield
                finally:
                    (self.path / "lock").unlink()
        except Timeout:
            raise InputError(f"{self.path}: another process is at work on this run") from None

    def result(self):
        """What result.json holds, None before the run is finished."""
        return self.of_this_run("result.json", groups.read_result)

    def checkpoint(self):
        """What checkpoint.pt holds, None before the first epoch has ended."""
        return self.of_this_run("checkpoint.pt", read_checkpoint)

    def of_this_run(self, name, read):
        """A file as `read`, None without it.  Raises InputError that names what differs."""
        path = self.path / name
        if not path.exists():
            return None
        with as_input_error(f"{path}: not a file of this program", "; choose another --out"):
            content = read(path)
            there = content["config"] | content["digests"]
        here = self.made_from["config"] | self.made_from["digests"]
        differ = [f"{key} ({there.get(key)} there, {here[key]} here)"
                  for key in here if there.get(key) != here[key]]
        if differ:
            raise InputError(f"{self.path} was made with other settings: {', '.join(differ)}; "
                             "choose another --out")
        return content

    def resume(self, model, optimizer):
        """Put the checkpoint, if any, into model, optimizer and torch's generators; -> Progress."""
        checkpoint = self.checkpoint()
        if not checkpoint:
            return Progress()
        with as_input_error(f"{self.path}/checkpoint.pt does not fit", "; choose another --out"):
            copy_into(model, checkpoint["progress"]["best"])       # can it be, at the end?
            copy_into(model, checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            torch.set_rng_state(checkpoint["rng"])
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"][:torch.cuda.device_count()])
            progress = Progress(**checkpoint["progress"])
            print("going on from step {step}, dev {dev_accuracy:.1f}%".format(**progress.curve[-1]))
            if checkpoint["threads"] != torch.get_num_threads():
                print("on another number of threads: sums may differ in their last bits")
        return progress

    def save_checkpoint(self, model, optimizer, progress):
        """log.csv, a row an epoch, and then checkpoint.pt, everything needed to go on."""
        write_file(self.path / "log.csv", csv_text(progress.curve))
        content = dict(
            self.made_from,
            progress=vars(progress),
            model=trainable(model),
            optimizer=optimizer.state_dict(),
            rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            threads=torch.get_num_threads(),
        )
        memory = io.BytesIO()
        torch.save(content, memory)
        write_file(self.path / "checkpoint.pt", memory.getbuffer())

    def save_result(self, model, task, predicted, result):
        """Predictions, adapter and, last of all, result.json."""
        config = self.made_from["config"]
        rows = [dict(language=example.code, row=example.row, label=example.label,
                     predicted=task.labels[i])
                for example, i in zip(task.test, predicted)]
        write_file(self.path / "predictions.csv", csv_text(rows))
        if config["method"] != "full" and model.pool == "first":
            save_adapter(model, self.path / "adapter", config["backbone"], dict(
                method=config["method"], xpe_ratio=config["xpe_ratio"], labels=task.labels,
                languages=sorted({example.code for example in task.train}),
                max_length=config["max_length"], groups=result["groups"]))
        else:
            print("no adapter: PEFT's needs a prompt, and a head that reads position 0")
        versions = dict(python=sys.version.split()[0], torch=torch.__version__)
        result = dict(self.made_from, versions=versions, labels=task.labels,
                      as_start=digest_of(self.path), **result)     # the `start` of runs from here
        write_file(self.path / "result.json", json.dumps(result, indent=1))

    def tidy(self):
        """Remove what nothing starts from: the 4.5 GB of XLM-R large that was fine-tuned."""
        if self.made_from["config"]["method"] == "full":
            (self.path / "checkpoint.pt").unlink(missing_ok=True)


def read_checkpoint(path):
    """What save_checkpoint wrote, read without unpickling code."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


# ---------------------------------------------------------------------------------------- Adapters
# Prompt and head as PEFT loads them.  Needs json, sys, torch, NamedTuple, Path, InputError, and the
# sections The prompts and Files.

VECTORS = "prompt_embeddings"                      # PEFT's name for a prompt's vectors
HEAD = "base_model.classifier"                     # and for the head
FREE = "prompt_encoder.embedding.weight"           # AUTHORS: theirs for free vectors
PSEUDO = "prompt_encoder.xpe_embedding.weight"     # AUTHORS: for a pseudo prompt
MLP = "prompt_encoder.xpe_head"                    # AUTHORS: for the MLP behind it
SAME_HEAD = ("camembert", "roberta", "xlm-roberta")                # where PEFT's head is this one
OURS = "XPE_PROMPT"                                # peft_type elsewhere, which PEFT refuses


class Adapter(NamedTuple):
    """An adapter as its files have it."""
    config: dict                  # PEFT's adapter_config.json
    labels: list                  # names of the classes in order, [] where nobody knows
    languages: list               # codes of what it was trained on, [] where nobody knows
    max_length: int               # of its texts in tokens, 0 where nobody knows
    tensors: dict                 # {name: tensor}; finished and free vectors are VECTORS
    of_authors: bool              # are names and order of the classes those of their programs?

    def rows(self, name):
        """How many rows a tensor has, 0 where there is none of this name."""
        return len(self.tensors.get(name, ()))

    def prompt_length(self):
        """P: vectors that are free or finished, and those that are encoded."""
        return self.rows(VECTORS) + self.rows(PSEUDO)


def save_adapter(model, folder, base="", facts=None):
    """Write prompt (P, H) and head as an adapter for the backbone `base`; `facts` go into xpe.json.

    It is PEFT's PROMPT_TUNING where PEFT's head is XLM-R's too; else of a type that PEFT refuses.
    Raises InputError unless the head reads position 0, as PEFT's does.
    """
    from safetensors.torch import save
    if model.pool != "first":
        raise InputError(f"PEFT's head reads position 0: pool {model.pool!r} is no adapter")
    training = model.prompt.training
    prompt = model.prompt.eval()()                 # (P, H), without dropout
    model.prompt.train(training)
    tensors = {VECTORS: prompt, **dict(model.head.named_parameters(HEAD))}
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    backbone = model.backbone.config
    config = dict(
        peft_type="PROMPT_TUNING" if backbone.model_type in SAME_HEAD else OURS,
        task_type="SEQ_CLS",                       # without it PEFT takes a random head, in silence
        base_model_name_or_path=base,
        num_virtual_tokens=prompt.shape[0],
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=backbone.num_attention_heads,
        num_layers=backbone.num_hidden_layers,
        modules_to_save=["classifier"],
        prompt_tuning_init="RANDOM",
        inference_mode=True,
    )
    folder = Path(folder)
    write_file(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_file(folder / "adapter_config.json", json.dumps(config, indent=1))
    write_file(folder / "xpe.json", json.dumps(facts or {}, indent=1))


def read_adapter(folder):
    """The Adapter in a folder.  Raises InputError, by name, for what cannot be right."""
    with as_input_error(f"{folder}: not a readable adapter"):
        config = json.loads(Path(folder, "adapter_config.json").read_bytes())
        facts = Path(folder, "xpe.json")
        facts = json.loads(facts.read_bytes()) if facts.exists() else {}
        labels = facts.get("labels", [])
        if labels != [str(label) for label in labels]:
            raise TypeError(f"labels are {labels}, which is no list of names")
        if config["peft_type"] not in ("PROMPT_TUNING", "P_TUNING", "XPE", OURS):
            raise TypeError(f"an adapter of type {config['peft_type']} holds no soft prompt")
        tensors = read_tensors(folder)
        of_authors = VECTORS not in tensors
        if of_authors and FREE in tensors:
            old = MLP + ".0.weight" in tensors and PSEUDO not in tensors
            name = PSEUDO if old else VECTORS      # AUTHORS: XPE, before November 2025
            tensors[name] = tensors.pop(FREE)
        adapter = Adapter(config, labels, facts.get("languages", []),
                          int(facts.get("max_length", 0)), tensors, of_authors)
        length, stated = adapter.prompt_length(), config["num_virtual_tokens"]
        if length and repr(stated) != repr(length):        # "4", 4.0, True are no number of them
            raise ValueError(f"{length} vectors, where num_virtual_tokens is {stated!r}")
        encoder = config.get("encoder_reparameterization_type", "MLP")
        if PSEUDO in tensors and encoder != "MLP":
            raise TypeError(f"its prompt encoder is of type {encoder}, not an MLP")
    return adapter


def read_tensors(folder):
    """{name: tensor} of an adapter.  Raises ValueError for one that is not whole or not finite."""
    from safetensors.torch import load_file
    path = Path(folder, "adapter_model.safetensors")
    if path.exists():
        tensors = load_file(path)
    else:                                          # PEFT before 0.7
        path = Path(folder, "adapter_model.bin")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in tensors.items():
        if tensor.nbytes > path.stat().st_size:
            raise ValueError(f"{name} is larger than its file")
        if tensor.dim() == 0 or not len(tensor) or not tensor.isfinite().all():
            raise ValueError(f"{name} has no rows, or a value that is not finite")
    return tensors


def width(backbone):
    """Size of the vectors that a backbone takes as its input, H with XLM-R."""
    return backbone.get_input_embeddings().embedding_dim


def load_adapter(folder, backbone):
    """A PromptedClassifier from our folder, PEFT's PROMPT_TUNING or P_TUNING, or the authors' own,
    whose prompt still has its encoder.  Raises InputError that names a tensor and both shapes."""
    adapter = read_adapter(folder)
    if adapter.config["peft_type"] != OURS and backbone.config.model_type not in SAME_HEAD:
        raise InputError(f"{folder}: PEFT's head for {backbone.config.model_type} is not XLM-R's")
    base, name = adapter.config.get("base_model_name_or_path"), backbone.config.name_or_path
    if base and name and base != name:             # perhaps the same, moved
        print(f"{folder} was made for {base}, and is used with {name}", file=sys.stderr)
    prompt = prompt_of(adapter.rows(VECTORS), adapter.rows(PSEUDO), width(backbone),
                       mlp_hidden=adapter.rows(MLP + ".0.weight") or 1)
    model = PromptedClassifier(backbone, prompt, adapter.rows(HEAD + ".out_proj.weight") or 1)
    model.to(backbone.device)

    parameters = named_as_adapter(model)
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    there = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    wrong = [f"{name}: {there.get(name, 'missing')}, where {here.get(name, 'none')} is wanted"
             for name in sorted(here | there) if here.get(name) != there.get(name)]
    if wrong:
        raise InputError(f"{folder}: {'; '.join(wrong)}")
    for name, parameter in parameters.items():
        parameter.data.copy_(adapter.tensors[name])
    return model.eval()


def named_as_adapter(model):
    """{name in an Adapter: parameter of the model}."""
    found = dict(model.head.named_parameters(HEAD))
    for module in model.prompt.modules():
        if isinstance(module, SoftPrompt):
            found[VECTORS] = module.vectors
        if isinstance(module, CrossPromptEncoder):
            found[PSEUDO] = module.pseudo_prompt
            found.update(module.mlp.named_parameters(MLP))
    return found


# ---------------------------------------------------------------------------- Loading and checking

def check_settings(cfg):
    """Put defaults where nobody said anything.  Raises InputError for what can be told at once."""
    known_to_adapter = ("backbone", "max_length") if cfg.load else ()
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value is not None:
            setattr(cfg, field.name, checked(field, value))
        elif field.name not in known_to_adapter:
            setattr(cfg, field.name, field.metadata["toy" if cfg.toy else "default"])
    for name in ("source", "languages", "target"):
        codes = map(str.strip, getattr(cfg, name).split(","))
        setattr(cfg, name, ",".join(filter(None, codes)))
    check_together(cfg)
    if cfg.weight_decay is None:
        cfg.weight_decay = 0.01 if cfg.recipe == "released" else 0.1       # PAPER 4.4: 0.1
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    with as_input_error(f"--device {cfg.device}: not on this machine", "; use cpu or auto"):
        there = torch.zeros(1, device=cfg.device)
        there.item()                               # meta, for one, has nothing in it
        cfg.device = str(there.device)
    if cfg.dtype == "auto":                        # AUTHORS: bf16 autocast
        cfg.dtype = "bf16" if cfg.method != "full" and has_bf16(cfg.device) else "fp32"


def has_bf16(device):
    """Is it a GPU that computes in bf16?  Those older than Ampere (8.0) only emulate it, slowly."""
    return device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)


def checked(field, value):
    """A setting's value in its own type.  Raises InputError out of its bounds or choices."""
    flag, facts = "--" + field.name.replace("_", "-"), field.metadata
    choices, least, below = facts["choices"], facts["least"], facts["below"]
    if choices and value not in choices:
        raise InputError(f"{flag} {value!r}: choose from {', '.join(choices)}")
    if field.type in (int, float):
        wrong = isinstance(value, str) or not least <= value < below
        if wrong or field.type(value) != value:
            raise InputError(f"{flag} {value!r}: must be of type {field.type.__name__} and lie in "
                             f"[{least}, {below})")
    return field.type(value)


def check_together(cfg):
    """Fill in share and length of the prompt; raise InputError for what contradicts each other."""
    method, share = cfg.method, SHARES[cfg.method]
    least = {"full": 0, "dual": 2}.get(method, 1)
    if cfg.prompt_length is None:
        cfg.prompt_length = 20 if least else 0
    if cfg.xpe_ratio is None:
        cfg.xpe_ratio = share
    mixed = method == "dual" and 0 < cfg.xpe_ratio < 1
    of_prompts = cfg.prompt_length or cfg.target or cfg.dtype == "bf16"
    refuse({
        "toy, as an encoder or as data, belongs to --toy; a folder of this name is ./toy":
            "toy" in (cfg.backbone, cfg.data) and not cfg.toy,
        "--predict needs --load, the folder of an adapter": cfg.predict and not cfg.load,
        "--labels names the classes of an adapter: it needs --load or --init-from":
            cfg.labels and not cfg.load and not cfg.init_from,
        "--method full takes no --prompt-length and no --target (train on a target with --source "
        "CODE), and trains in fp32, not in bf16": method == "full" and of_prompts,
        f"--prompt-length {cfg.prompt_length}: {method} needs {least}": cfg.prompt_length < least,
        f"--xpe-ratio {cfg.xpe_ratio:g} with --method {method}: it belongs to dual, and lies "
        "between 0 (spt) and 1 (xpe)": cfg.xpe_ratio != share and not mixed,
    })


def refuse(problems):
    """Raise an InputError with the first message of {message: is it so?} that is so."""
    for message, so in problems.items():
        if so:
            raise InputError(message)


def load_backbone(name, device="cpu", dtype=torch.float32):
    """The frozen encoder and its tokenizer, from the hub, a local folder, or "toy".

    Raises InputError, also for files that do not fill the encoder, which would leave a part of it
    random, and for a tokenizer that is not the encoder's.
    """
    with as_input_error(f"cannot load the backbone {name!r}", "; give a folder, --backbone DIR, or "
                        "--toy"):
        if name == "toy":
            backbone, tokenizer = toy_backbone()
            set_precision(backbone, dtype)
            lacking = []
        else:
            backbone, tokenizer, lacking = load_pretrained(name, device, dtype)
        words, rows = len(tokenizer), backbone.get_input_embeddings().num_embeddings
    lacking += [key for key, p in backbone.named_parameters() if not p.sum().isfinite()]
    refuse({
        f"the files of {name} do not fill the encoder: {', '.join(lacking[:3])} lack or are not "
        "finite": lacking,
        f"the tokenizer of {name} is not the encoder's: it has {words} tokens, the encoder {rows}, "
        f"and padding is {tokenizer.pad_token}":
            not rows / 2 <= words <= rows or tokenizer.pad_token_id is None,
    })
    return backbone.to(device).requires_grad_(False), tokenizer


def ask_hub_once(name, file, kind="model"):
    """Raise where neither disk nor hub has a file: the libraries would ask for half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    here = Path(name).exists() or try_to_load_from_cache(name, file, repo_type=kind)
    if not here and not constants.HF_HUB_OFFLINE:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind))


def load_pretrained(name, device, dtype):
    """(backbone without pooler, tokenizer, names of the weights that its files lack)."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, logging
    ask_hub_once(name, "config.json")
    logging.set_verbosity_error()                  # "unused classifier weights": by intention
    logging.disable_progress_bar()
    options = dict(trust_remote_code=False)        # a foreign adapter may name any backbone
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", **options)
    config = AutoConfig.from_pretrained(
        name, return_dict=True, **options,
        chunk_size_feed_forward=0,                 # the same numbers, for texts of every length
        gradient_checkpointing=False)              # it would go backward without FastOnCPU
    if torch.device(device).type == "cpu" and dtype == torch.bfloat16:
        options["attn_implementation"] = "eager"   # there alone the fused one's gradient is slow
    backbone, report = AutoModel.from_pretrained(name, config=config, dtype=dtype,
                                                 output_loading_info=True, **options)
    if hasattr(backbone, "decoder"):               # of T5 and BART: the other half
        backbone = backbone.get_encoder()
    if hasattr(backbone, "pooler"):
        backbone.pooler = nn.Identity()            # nobody reads it
    lacking = [key for key in report["missing_keys"]
               if not key.startswith(("pooler.", "decoder."))]         # which nobody reads
    return backbone, tokenizer, sorted(lacking)


@torch.no_grad()
def check_model(model, cfg):
    """Try a model on texts of the full length.  Raises InputError unless the position that is read
    sees their end, and the vectors of a text with padding give the same as its tokens; in fp32,
    since bf16 is too coarse to tell."""
    model.eval()
    backbone, dtype = model.backbone, model.backbone.dtype
    set_precision(backbone, torch.float32)
    half = cfg.max_length // 2
    places = torch.arange(cfg.max_length, device=cfg.device)[None]         # (1, T)
    ids, mask, front = 10 + places % 8, torch.ones_like(places), (places < half).long()
    other = ids + 1 - front                        # other words in the second half
    with as_input_error(f"--backbone {cfg.backbone} cannot be prompted"):
        blind = torch.equal(model(ids, mask), model(other, mask))
        vectors = backbone.get_input_embeddings()(ids)         # front: whatever is behind the text
        padded = backbone(inputs_embeds=vectors, attention_mask=front).last_hidden_state
        plain = backbone(input_ids=ids[:, :half]).last_hidden_state                # (1, T / 2, H)
        error = (padded[:, :half] - plain).abs().max() / plain.abs().max()
        set_precision(backbone, dtype)
        model(ids, mask)
    name = f"--backbone {cfg.backbone}: "
    refuse({
        name + "the position that the head reads does not see the text behind it, as in a decoder; "
        "an encoder is needed": blind,
        name + "it depends on padding, or treats vectors unlike the tokens that they are of":
            not error <= 1e-4,                     # what fp32 allows
    })


def set_precision(module, dtype):
    """Change its parameters alone: numbers such as the angles of rotary positions stay in fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def count_positions(backbone):
    """How many positions prompt and text may take, infinite where they are not numbered."""
    for name, module in backbone.named_modules():
        if "position" in name and isinstance(module, nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1       # XLM-R: 2
            return module.num_embeddings - before
    return math.inf


TSV_FILES = "[!.]*/*.tsv"                          # <code>/train.tsv and so on in --data


def available_codes(data):
    """The language codes in `data`.  Raises InputError where there is no such folder."""
    folder = Path(data)
    if data == "toy" or not folder.is_dir():
        if data.startswith((".", "/", "~")):
            raise InputError(f"--data {data}: no such folder")
        return list(groups.LANGUAGES)              # those of the hub's SIB-200, too
    codes = {path.parent.name for path in folder.glob(TSV_FILES)}
    if codes:
        return sorted(codes)
    from datasets import get_dataset_config_names
    with as_input_error(f"--data {data}: neither <code>/train.tsv nor a data set in it"):
        names = sorted(get_dataset_config_names(data))
    if names == ["default"] and any(folder.glob("[!.]*/train.csv")):
        raise InputError(f"--data {data}: train.csv is there: write train.tsv, with tabs")
    return names


def codes_of(text, data):
    """The language codes that a setting names, such as --source.  Raises InputError."""
    return groups.resolve(text, available_codes(data), f"--data {data}")


def text_lines(path, remedy=""):
    """The lines of a UTF-8 file, or of standard input for "-".  Raises InputError."""
    with as_input_error(f"{path}: cannot be read", remedy):
        file = open(0 if path == "-" else path, encoding="utf-8-sig", errors="surrogateescape",
                    newline="")
    with file:
        for number, line in enumerate(file, 1):
            with as_input_error(f"{path}:{number}: not UTF-8"):
                line.encode()                      # bytes that are no UTF-8 became surrogates
            yield line


class Example(NamedTuple):
    """A sentence of a data set."""
    text: str
    label: str
    code: str                     # of its language
    row: int                      # its number in the language's file, from 0


def read_tsv(path):
    """[(place, text, label)] of a TSV file as SIB-200's are: CSV with tabs, quoted where needed."""
    csv.field_size_limit(2**30)
    other = path.with_suffix(".csv")
    remedy = f"; {other.name} is there: write it with tabs" if other.exists() else ""
    reader = csv.DictReader(text_lines(path, remedy), delimiter="\t", strict=True)
    rows, line = [], 1
    try:
        columns = reader.fieldnames or []
        if columns.count("category") != 1 or columns.count("text") != 1:
            raise InputError(f"{path}:1: the columns are {columns}; one must be category, one text")
        for row in reader:
            line = reader.line_num
            # A quote that nobody closed takes tabs and line ends, so whole rows, into one field.
            swallowed = any("\t" in field and set("\r\n") & set(field)
                            for field in row.values() if field)
            if None in row or swallowed:
                raise InputError(f"{path}:{line}: more columns than the header has; put a text "
                                 "that holds a tab, or begins with a quote, in quotes")
            rows.append((f"{path}:{line}", row["text"], row["category"]))
    except csv.Error as error:
        raise InputError(f"{path}, behind line {line}: {describe(error)}; put a text that begins "
                         "with a quote in quotes, and double those inside") from None
    return rows


def read_rows(data, code, split):
    """[(place, text, label)] from a TSV folder, the hub, or a local folder for load_dataset."""
    if data == "toy":
        return toy_rows(code, split)
    path = Path(data, code, split + ".tsv")
    if any(Path(data).glob(TSV_FILES)):
        return read_tsv(path)
    remedy = "; offline, give a local folder with --data DIR, or --toy"
    problem = f"cannot read {code}, {split}, of {data}"
    with as_input_error(problem, remedy), tempfile.TemporaryDirectory() as fresh:
        import datasets
        datasets.disable_progress_bars()
        ask_hub_once(data, "README.md", "dataset")
        cache = fresh if Path(data).exists() else None     # theirs does not see that a file changed
        table = datasets.load_dataset(data, code, split=split.replace("dev", "validation"),
                                      cache_dir=cache)
        name_of = getattr(table.features["category"], "int2str", lambda label: label)
        return [(f"{path} row {i}", row["text"], name_of(row["category"]))
                for i, row in enumerate(table)]


def load_language(data, code, split, labels=()):
    """Texts and label names of one language; `split` is train, dev or test, `data` as in Config.

    With `labels`, every label must be one of them.  Raises InputError that names file and line.
    """
    examples = load_examples(data, [code], split, labels)
    return [example.text for example in examples], [example.label for example in examples]


def load_examples(data, codes, split, labels=()):
    """[Example] of several languages, one after the other; the rest as in load_language."""
    examples = []
    for code in codes:
        rows = read_rows(data, code, split)
        if not rows:
            raise InputError(f"no {split} rows for {code} in {data}")
        for row, (place, *values) in enumerate(rows):
            text, label = ["" if value is None else str(value) for value in values]
            label = label.strip()
            if not text.strip():
                raise InputError(f"{place}: empty text")
            if not label or labels and label not in labels:
                raise InputError(f"{place}: unknown label {label!r}; known: {', '.join(labels)}")
            examples.append(Example(text, label, code, row))
    return examples


class Task(NamedTuple):
    """What a run learns from and is measured by."""
    train: list                   # [Example]
    dev: list
    test: list
    labels: list                  # names of the classes, in order
    digests: dict                 # {what: digest}: another digest means another run


def read_task(cfg):
    """The Task of a config: read before the backbone, which takes long.  Raises InputError."""
    sources = codes_of(cfg.source, cfg.data)
    targets = codes_of(cfg.target or cfg.source, cfg.data)
    tested = codes_of(cfg.languages, cfg.data)
    train = load_examples(cfg.data, sources, "train")
    found = {example.label for example in train}
    known = set(groups.LABELS)
    labels = sorted(known if found > known else found)
    if targets != sources or found > known:        # an eighth label in SIB-200 is an error
        train = load_examples(cfg.data, targets, "train", labels)
    dev = load_examples(cfg.data, targets, "dev", labels)
    test = load_examples(cfg.data, tested, "test", labels)
    digests = {"training sentences": digest_of_text((train, dev, labels)),
               "test sentences": digest_of_text(test),
               "encoder": digest_of(cfg.backbone)}
    if cfg.init_from:
        if not Path(cfg.init_from).is_dir():
            raise InputError(f"--init-from {cfg.init_from}: no such folder")
        digests["start"] = digest_of_start(cfg.init_from) + cfg.labels
    return Task(train, dev, test, labels, digests)


def digest_of_text(things):
    """A digest of how things are printed."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:12]


def digest_of(folder):
    """A digest of an encoder's or a start's files; of a hub's encoder, its name."""
    read = (".json", ".safetensors", ".bin", ".model", ".txt", ".csv")
    digest = hashlib.sha256(b"" if Path(folder).is_dir() else folder.encode())
    for path in sorted(Path(folder).glob("*.*")):
        if path.suffix in read and path.name != "result.json":     # it has the time in it
            facts = path.stat()
            digest.update(path.name.encode())
            digest.update(digest_of_file(path, facts.st_size, facts.st_mtime_ns))
    return digest.hexdigest()[:12]


def digest_of_start(folder):
    """The digest that a run gave itself, whatever is packed or added since; else its files'."""
    result = Path(folder, "result.json")
    own = groups.read_result(result).get("as_start") if result.exists() else None
    return own or digest_of(folder)


@functools.cache
def digest_of_file(path, size, changed):
    """Of 2 GB it takes seconds: once in a process, unless size or time of change differ."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def build_model(cfg, labels):
    """The model that a config starts from, and its tokenizer.  Raises InputError."""
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    backbone, tokenizer = load_backbone(cfg.backbone, cfg.device, dtype)
    room = count_positions(backbone)
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    refuse({
        f"--prompt-length {cfg.prompt_length} + --max-length {cfg.max_length}: more than the "
        f"{room} positions of {cfg.backbone}": cfg.prompt_length + cfg.max_length > room,
        f"--pool bos: texts begin with no special token in {cfg.backbone}":
            cfg.pool == "bos" and special[:1] != [1],
    })
    torch.manual_seed(cfg.seed)                    # before anything that is trained is built
    prompt = build_prompt(cfg.method, cfg.prompt_length, width(backbone), cfg.xpe_ratio,
                          mlp_hidden=cfg.mlp_hidden, dropout=cfg.dropout)
    model = PromptedClassifier(backbone, prompt, len(labels), cfg.pool, cfg.head_dropout)
    model.to(cfg.device)
    check_model(model, cfg)
    backbone.requires_grad_(cfg.method == "full")
    if cfg.init_from:
        start_from(cfg.init_from, model, labels, cfg)
    return model, tokenizer


def start_from(folder, model, labels, cfg):
    """Put prompt and head of a finished run, or of an adapter, into a model (--init-from)."""
    folder = Path(folder)
    where = f"--init-from {folder}: "
    with as_input_error(where + "does not fit",
                        "; a run must be finished, --method and length the same; a finished prompt "
                        "has no encoder and goes on as --method spt"):
        if (folder / "adapter_config.json").exists():
            adapter = read_adapter(folder)
            tensors = trainable(load_adapter(folder, model.backbone))
            theirs = class_names(adapter, cfg.labels)
            made = dict(pool="first", target="", source=",".join(adapter.languages) or cfg.source)
            encoder = digest_of(cfg.backbone)      # nobody knows
            if cfg.target and not adapter.languages:
                print(f"{folder} does not say what it was trained on: it counts as --source "
                      f"{cfg.source}", file=sys.stderr)
        else:
            refuse({where + "a run knows the names of its classes; leave --labels out": cfg.labels})
            progress = read_checkpoint(folder / "checkpoint.pt")["progress"]
            tensors = progress["best"]
            result = json.loads((folder / "result.json").read_bytes())
            refuse({where + "its checkpoint.pt is of another training than its result.json; train "
                    "it again in another --out": progress["curve"] != result["dev_curve"]})
            theirs, made, encoder = result["labels"], result["config"], result["digests"]["encoder"]
        learned = made["target"] or made["source"]
        refuse({
            where + f"it was trained with --source {learned} --pool {made['pool']}":
                made["pool"] != cfg.pool or cfg.target and other_source(learned, cfg),
            where + "it was trained with another encoder": encoder != digest_of(cfg.backbone),
            where + f"its labels are {', '.join(theirs)}, not {', '.join(labels)}":
                set(theirs) != set(labels),
        })
        order = [theirs.index(label) for label in labels]          # a class is known by its name
        for name in ("head.out_proj.weight", "head.out_proj.bias"):
            tensors[name] = tensors[name][order]
        copy_into(model, tensors)


def other_source(source, cfg):
    """Are the languages of a --source others than those of the config's?"""
    return set(codes_of(source, cfg.data)) != set(codes_of(cfg.source, cfg.data))


def class_names(adapter, said=""):
    """The names of an Adapter's classes, in order: those `said` (a,b,c), else its own, else guessed
    with a note.  Raises InputError where they are not as many as its classes."""
    refuse({"the adapter knows the names of its classes; leave --labels out":
            said and adapter.labels})
    labels = [name.strip() for name in said.split(",")] if said else adapter.labels
    if not labels:                                 # AUTHORS: the data set's own order
        labels = list(groups.SIB200_ORDER) if adapter.of_authors else sorted(groups.LABELS)
        print(f"the adapter names no labels: SIB-200's are taken, from {labels[0]} to "
              f"{labels[-1]}; --labels says others", file=sys.stderr)
    classes = adapter.rows(HEAD + ".out_proj.bias")
    if not classes == len(labels) == len(set(labels)):
        raise InputError(f"the adapter's head has {classes} classes, and {len(set(labels))} are "
                         f"named: {', '.join(labels)}")
    return labels


# ----------------------------------------------------------------------------------------- The toy

def toy_backbone():
    """A random two-layer XLM-R over 70 topic words, 50 filler and 300 foreign ones, and its
    tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel
    words = ["<s>", "<pad>", "</s>", "<unk>"]
    for kind, count in (("topic", 70), ("filler", 50), ("foreign", 300)):
        words += [f"{kind}{i}" for i in range(count)]
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))   # <s> text </s>
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", pad_token="<pad>")
    config = XLMRobertaConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=130, type_vocab_size=1,
        initializer_range=0.1)
    with torch.random.fork_rng(devices=[]):        # whatever the seed, like a pretrained encoder
        torch.manual_seed(0)
        backbone = XLMRobertaModel(config, add_pooling_layer=False)
        topics = torch.randn(7, 64)                # words of a topic look alike, as if pretrained
        vectors = backbone.get_input_embeddings().weight.data                      # (424, H)
        vectors[4:74] += topics.repeat_interleave(10, dim=0)                       # (70, H)
    return backbone, tokenizer


def toy_rows(code, split):
    """[(place, text, label)]: half topic words, half filler.  A topic word turns foreign, which
    says nothing: 5 % of them in seen languages, 90 % in low-performing, 65 % in other unseen."""
    foreign = 0.65
    if code in groups.SEEN:
        foreign = 0.05
    if code in groups.LOW_PERFORMING:
        foreign = 0.9
    dice = random.Random(f"{code} {split}")
    rows = []
    for _ in range(140 if split == "train" else 35):
        topic = dice.randrange(7)
        words = [f"filler{dice.randrange(50)}" for _ in range(dice.randint(3, 6))]
        for _ in range(dice.randint(3, 6)):
            word = f"topic{10 * topic + dice.randrange(10)}"
            words.append(f"foreign{dice.randrange(300)}" if dice.random() < foreign else word)
        rows.append((code, " ".join(dice.sample(words, len(words))), groups.LABELS[topic]))
    return rows


# ---------------------------------------------------------------------------- Jobs and command line

def finished(cfg):
    """Is all that a config asks for there already?  What would be refused is not finished."""
    try:
        configs = configs_of_transfer(cfg) if cfg.target else [cfg]
        return all(Path(one.out, run_name(one), "result.json").exists()            # soon told
                   and RunFolder(one, read_task(one)).result() for one in configs)
    except InputError:
        return False


def use_adapter(cfg):
    """--load: accuracy of an adapter per language; with --predict, a label for each line."""
    adapter = read_adapter(cfg.load)
    base = adapter.config.get("base_model_name_or_path")
    of_adapter = dataclasses.replace(              # None: the default
        cfg, load="", predict="", labels="", method="spt", xpe_ratio=None,
        prompt_length=adapter.prompt_length() or None,
        backbone=cfg.backbone or base or None,
        max_length=cfg.max_length or adapter.max_length or None)
    model, tokenizer = build_model(of_adapter, groups.LABELS)      # any head: its own comes next
    model = load_adapter(cfg.load, model.backbone).cache_prompt()
    labels = class_names(adapter, cfg.labels)

    def sentences_of(examples):
        return tokenize(examples, labels, tokenizer, cfg.device, of_adapter.max_length)

    if not cfg.predict:
        codes = codes_of(cfg.languages, cfg.data)
        examples = load_examples(cfg.data, codes, "test", labels)
        accuracy, _, _ = evaluate(model, sentences_of(examples))
        groups.print_result(dict(config=definition(cfg), accuracy=accuracy))
        return
    for lines in read_lines(cfg.predict):
        texts = [Example(line, labels[0], "", 0) for line in lines]
        shares, classes = predict(model, sentences_of(texts)).softmax(-1).max(-1)
        for line, share, label in zip(lines, shares.tolist(), classes.tolist()):
            print(f"{labels[label]}\t{share:.4f}\t{line}" if line.strip() else f"\t\t{line}")


def read_lines(path, size=256):
    """Lists of lines, their ends cut off.  Raises InputError."""
    lines = (line.rstrip("\r\n") for line in text_lines(path))
    while some := list(itertools.islice(lines, size)):
        yield some


def benchmark(cfg):
    """--benchmark: a training step and an evaluation batch, beside the Linears alone.

    Texts cut at 36 tokens; a share is of the products' rate.  Operations are counted by torch.
    """
    cfg = dataclasses.replace(cfg, max_length=36)
    model, tokenizer = build_model(cfg, groups.LABELS)
    trained = PromptedClassifier(model.backbone, model.prompt, len(groups.LABELS), cfg.pool)
    trained.to(cfg.device).cache_prompt()          # what a run tests
    optimizer = Adafactor(parameter_groups(model, cfg), cfg.lr)
    size, text = cfg.batch_size, " ".join(map(str, range(36)))
    examples = [Example(text, groups.LABELS[0], "", 0)] * size
    sentences = tokenize(examples, groups.LABELS, tokenizer, cfg.device, cfg.max_length)
    linears = [module for module in model.backbone.modules() if isinstance(module, nn.Linear)]
    widest = max(linear.in_features for linear in linears)
    x = linears[0].weight.new_empty(size * (cfg.prompt_length + 36), widest).normal_()

    @torch.no_grad()
    def products():
        for linear in linears:
            y = linear(x[:, :linear.in_features])
        return y

    def training():
        set_training_mode(model, cfg)
        return train_step(model, sentences.batch(np.arange(size)), optimizer, cfg.clip)

    def evaluation():
        return predict(trained, sentences)

    works = (products, training, evaluation)
    medians = times_of(works)                                              # (3,)
    peak = peak_memory(cfg.device)                 # before the counting, which takes more
    rates = [count_operations(work) for work in works] / medians / 1e9
    print(f"a batch of {size:<5}       ms sentences/s  GFLOP/s share")
    for work, seconds, rate in zip(works, medians, rates):
        print(f"{work.__name__:<16} {1000 * seconds:8.1f} {size / seconds:11.1f} {rate:8.0f} "
              f"{rate / rates[0]:5.0%}")
    print(f"peak memory {peak / 2**30:.2f} GiB; {cfg.dtype}, {cfg.device}")


def times_of(works):
    """Seconds for a batch of each work: medians of 5 rounds in turns, after one to warm up."""
    rounds = [[time_of(work) for work in works] for _ in range(6)]         # (6, works)
    return np.median(rounds[1:], axis=0)


def time_of(work):
    """Seconds for a batch, of 8 in a row; the device is waited for once."""
    return timeit.timeit(lambda: [work() for _ in range(8)][-1].sum().item(), number=1) / 8


def count_operations(work):
    """Multiplications and additions of a work in products; attention is made to show its own."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_memory(device):
    """The most bytes that were in use: on a GPU by torch, else by the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource                                # not on Windows
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1024 if sys.platform == "linux" else 1)         # macOS counts bytes


HELP_GROUPS = {  # the settings from which on --help has another title
    "method": "the method", "source": "the languages", "steps": "the training",
    "target_steps": "the training on each language of --target", "seed": "the run",
    "load": "instead of training"}


WITH_LOAD = "load predict labels backbone data languages max_length device dtype toy out".split()


def parse(argv=None):
    """The command line as a Config.  Raises InputError."""
    parser = groups.Parser(
        usage="python xpe.py [--option value ...]   (below, the values are the defaults)",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    for field in dataclasses.fields(Config):
        if field.name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[field.name])
        default = field.metadata["default"]
        kind = dict(type=field.type, metavar="..." if default in (None, "") else default)
        if field.type is bool:
            kind = dict(action="store_true", default=None)
        group.add_argument("--" + field.name.replace("_", "-"), help=field.metadata["text"], **kind)
    said = vars(parser.parse_args(argv))
    cfg = Config(**said)
    for name in [name for name, value in said.items() if value is not None]:
        flag = "--" + name.replace("_", "-")
        of_the_source = name == "languages" or f"target_{name}" in said
        refuse({f"{flag} is empty: leave it out, or give a value": said[name] == "",
                f"{flag} has no effect with --load": cfg.load and name not in WITH_LOAD,
                f"{flag} has no effect with --target and --init-from: each target is tested alone, "
                "and trained by --target-steps and so on":
                    of_the_source and cfg.target and cfg.init_from,
                f"{flag} has no effect without --target":
                    name.startswith("target_") and not cfg.target})
    return cfg


def main(argv=None):
    """The command line; -> exit code: 0 done, 1 the run failed, 2 wrong input."""
    return groups.guarded("xpe.py", lambda: start(argv))


def start(argv):
    """Do what a command line asks for.  Raises MemoryError for each of torch's ways to say so."""
    try:
        cfg = parse(argv)
        if cfg.toy:
            torch.set_num_threads(1)               # more would wait for each other
        job_of(cfg)(cfg)
    except RuntimeError as error:                  # torch has no type of its own for a CPU's memory
        if not lacks_memory(error):
            raise
        raise MemoryError(f"{describe(error)}; a smaller --batch-size needs less") from error


def job_of(cfg):
    """The function that does what a config asks for."""
    if cfg.benchmark:
        return benchmark
    if cfg.load:
        return use_adapter
    return transfer if cfg.target else run


if __name__ == "__main__":
    sys.exit(main())
