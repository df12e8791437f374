# SPDX-License-Identifier: MIT
"""Cross-Prompt Encoder (XPE): soft prompts for languages an encoder hardly knows.

A minimal, pure-PyTorch, single-file reference implementation of "Cross-Prompt
Encoder for Low-Performing Languages" (Mikaberidze, Saghinadze, Ostermann,
Müller; Findings of IJCNLP-AACL 2025).  A few trained vectors stand in front of
a frozen XLM-R, which then classifies topics (SIB-200) in languages that it was
never trained on:

    python xpe.py --toy                           # offline, synthetic languages
    python xpe.py --method dual --xpe-ratio 0.7   # the paper's Table 1
    python xpe.py --backbone DIR --data DIR       # a local encoder, local files

Part I is the method, from the prompt to one whole run; Part II makes it fast,
safe and handy.  Letters: B batch, T text length, P prompt length (the paper's
n), H hidden size (d), C classes.  Numbers in brackets are the paper's sections.
Where the paper is silent or differs stands `PAPER section:` or `AUTHORS:`
(their released program).
"""
import argparse
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import random
import resource
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
# Part I: the method.  Whoever stops at its end has read all that the paper says.
# ==================================================================================================


# ------------------------------------------------------------------------------------- The prompts
# Sections 3.1 and 3.2, and the classifier around them.  To copy it alone: `import torch`, `from
# torch import nn`, `from torch.nn import functional as F`.

SHARES = {"spt": 0.0, "dual": 0.7, "xpe": 1.0, "full": 0.0}       # of the prompt, what is encoded
POOLS = {  # what the head reads of the states (B, P + T, H) and their mask (B, P + T) -> (B, H)
    "first": lambda states, mask, P: states[:, 0],         # AUTHORS: like PEFT, a virtual token
    "bos": lambda states, mask, P: states[:, P],           # <s>, the first token of the text
}


def for_batch(prompt, batch_size):
    """A prompt (P, H) as it is, or once for each example of a batch (B, P, H)."""
    return prompt if batch_size is None else prompt.expand(batch_size, -1, -1)


class SoftPrompt(nn.Module):
    """SPT (4.3): `length` free vectors, init N(0, 1).  forward() -> (P, H), or (B, P, H)."""

    def __init__(self, length, hidden):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(length, hidden))

    def forward(self, batch_size=None):
        # clone: torch's counter of operations cannot follow a mere view of a parameter
        return for_batch(self.vectors.clone(), batch_size)                 # (B, P, H)


class CrossPromptEncoder(nn.Module):
    """XPE (3.1): a pseudo prompt, each vector of which goes through one small MLP.

    forward() -> (P, H), or for a batch (B, P, H).  The pseudo prompt starts as N(0, 1).
    """

    def __init__(self, length, hidden, mlp_hidden=256, dropout=0.1):
        super().__init__()
        self.pseudo_prompt = nn.Parameter(torch.randn(length, hidden))
        self.mlp = nn.Sequential(            # AUTHORS: "two layers" are three Linears
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


def build_prompt(method, length, hidden, ratio=0.7, **encoder):
    """The prompt of a method, `length` vectors (P, H), of which DUAL encodes the share `ratio`.

    `encoder` goes to CrossPromptEncoder (mlp_hidden, dropout).  Raises KeyError for an unknown
    method, ValueError where DUAL has no room for a vector of each kind.
    """
    share = SHARES[method] if method != "dual" else ratio
    encoded = int(length * share)                  # AUTHORS: rounded down
    if method == "dual":
        if length < 2:
            raise ValueError("a dual prompt needs a length of at least 2")
        encoded = min(max(encoded, 1), length - 1)
    if encoded == 0:
        return SoftPrompt(length, hidden)
    cross = CrossPromptEncoder(encoded, hidden, **encoder)
    return cross if encoded == length else DualPrompt(SoftPrompt(length - encoded, hidden), cross)


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

        # The backbone itself adds positions, counted through prompt and text, and its LayerNorm.
        states = self.backbone(inputs_embeds=x, attention_mask=mask).last_hidden_state
        pooled = POOLS[self.pool](states, mask, P)                         # (B, H)
        return self.head(pooled.float())                                   # (B, C)

    def cache_prompt(self):
        """Keep only the finished prompt (3.1): inference needs no encoder and no pseudo prompt."""
        finished = self.eval().prompt().detach().clone()                   # (P, H)
        self.prompt = SoftPrompt(*finished.shape)
        self.prompt.vectors = nn.Parameter(finished, requires_grad=False)
        return self


# -------------------------------------------------------------------------- Optimizer and schedule
# Section 4.4.  Needs only `import math` and `import torch`: copy it alone.

class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern, 2018) with a given learning rate and without momentum.

    Of the running average V of the squared gradient (R, C) only the means of its rows and columns
    are kept, R + C numbers: V ~ row col^T / mean(row).  Tensors of one dimension keep V whole.
    The update G / sqrt(V) is clipped to RMS `clip_threshold`; decay is decoupled.  Equal to
    transformers' with scale_parameter, relative_step and warmup_init off.
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
            col = average("col", square.mean(dim=-2))                      # (C,)
            row = row / row.mean(dim=-1, keepdim=True)
            u = g * row.rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)  # (R, C)
        rms = u.square().mean().sqrt()
        return u / (rms / group["clip_threshold"]).clamp(min=1.0)


def cosine_with_restarts(step, warmup, total, cycles=2):
    """Factor in [0, 1] on the learning rate: linear warm-up, then `cycles` cosines from 1 to 0."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


# ---------------------------------------------------------------------------------- Configuration

def setting(default, text, toy=None, choices=(), least=0, below=2**40, defines=True):
    """A field of Config: `text` (unit, section) is its help; numbers lie in [least, below).

    The field starts as None, for which check_settings puts the default (with --toy, `toy`): so
    what somebody said is told from what nobody said.  defines: does it define a run?
    """
    facts = dict(default=default, text=text, toy=default if toy is None else toy, choices=choices,
                 least=least, below=below, defines=defines)
    return dataclasses.field(default=None, metadata=facts)


@dataclasses.dataclass
class Config:
    """Everything about a run.  The command line is made from it: `prompt_lr` is `--prompt-lr`.

    Raises InputError for a value out of bounds, and for values that contradict each other.
    """

    # The method
    method: str = setting("dual", "spt, xpe, dual (3), or full fine-tuning", choices=SHARES)
    xpe_ratio: float = setting(None, "encoded share of a dual prompt, in (0, 1) [0.7] (4.3)")
    prompt_length: int = setting(None, "virtual tokens P [20] (4.4)")
    mlp_hidden: int = setting(256, "width of the prompt encoder (authors' program)", least=1)
    dropout: float = setting(0.1, "dropout in the prompt encoder (authors' program)", below=1)
    head_dropout: float = setting(0.1, "dropout in the classification head", below=1)
    pool: str = setting("first", "the head reads the first virtual token, or bos: <s>",
                        choices=POOLS)
    backbone: str = setting("FacebookAI/xlm-roberta-large", "encoder: hub name or folder (4.1)",
                            toy="toy")

    # The languages
    source: str = setting("joshi5", "train on enarzho, joshi5, seen, or codes: a,b (4.2)")
    languages: str = setting("all", "test on all, or on names and codes as in --source")
    target: str = setting("", "then go on in each alone: codes, or full, the 46 (4.1)")
    data: str = setting("Davlan/sib200", "hub name, or DIR of <code>/{train,dev,test}.tsv (4.1)",
                        toy="toy")
    max_length: int = setting(164, "longest text in tokens (authors' program)", toy=32, least=3)

    # The training
    steps: int = setting(24_000, "optimization steps (4.4)", toy=300)
    batch_size: int = setting(32, "sentences a step (4.4)", least=1)
    lr: float = setting(5e-5, "peak learning rate of prompt encoder and head (4.4)", toy=3e-3)
    prompt_lr: float = setting(5e-3, "peak learning rate of the free vectors (4.4)", toy=5e-2)
    weight_decay: float = setting(None, "of encoder and head [0.1; 0.01 if released] (4.4)")
    warmup: float = setting(0.1, "share of steps with warm-up (authors' program)", below=1)
    cycles: int = setting(2, "cosine cycles, each from the peak to zero (4.4)", least=1)
    clip: float = setting(1.0, "largest global norm of the gradient (authors' program)")
    patience: int = setting(20, "epochs without a better dev loss, from half-time (4.4)",
                            least=1)
    recipe: str = setting("paper", "as in the paper, or as the authors released",
                          choices=("paper", "released"))
    backbone_dropout: str = setting("on", "the frozen backbone's own dropout: on or off",
                                    choices=("on", "off"))
    init_from: str = setting("", "start from a run, or from an adapter (--method spt)")

    # The training on each language of --target: these take the place of those above
    target_steps: int = setting(6_000, "--steps there (4.4)", toy=75, defines=False)
    target_warmup: float = setting(0.05, "--warmup there (authors' program)", below=1,
                                   defines=False)
    target_dropout: float = setting(0.0, "--dropout there (authors' program)", below=1,
                                    defines=False)
    target_patience: int = setting(30, "--patience there (4.4)", least=1, defines=False)

    # The run
    seed: int = setting(0, "random seed; the paper averages 10 (4.3)")
    out: str = setting("runs", "folder that holds one folder per run", defines=False)
    device: str = setting("auto", "cpu, cuda, cuda:1, ..., auto: cuda where there is one",
                          defines=False)
    dtype: str = setting("auto", "frozen weights: fp32, bf16; auto: bf16 on a GPU",
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
    """Tokenized sentences of one or more languages, whole on the device: 200 MB for 205."""
    ids: torch.Tensor             # (N, L) token ids, right-padded
    mask: torch.Tensor            # (N, L) 1 on tokens, 0 on padding
    classes: torch.Tensor         # (N,) class numbers
    lengths: np.ndarray           # (N,) tokens, on the host: no width is asked of the device
    languages: np.ndarray         # (N,) codes

    def batch(self, indices):
        """Sentences (B,) -> ids (B, T), mask (B, T), classes (B,); T is the longest's, in fours."""
        T = -(-int(self.lengths[indices].max()) // 4) * 4
        T = min(T, self.ids.shape[1])
        indices = torch.as_tensor(indices).to(self.ids.device, non_blocking=True)
        return self.ids[indices, :T], self.mask[indices, :T], self.classes[indices]


def encode(examples, labels, tokenizer, device="cpu", max_length=164):
    """[Example] as Sentences; a class is the place of its label in `labels`."""
    texts = [example.text for example in examples]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, padding=True,
                        return_attention_mask=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    classes = torch.tensor([labels.index(example.label) for example in examples])
    languages = np.array([example.code for example in examples])
    lengths = mask.sum(1).numpy()
    return Sentences(ids.to(device), mask.to(device), classes.to(device), lengths, languages)


def epoch_batches(lengths, size, seed, epoch):
    """Indices (B,) of each batch, similar lengths together (AUTHORS); decided by seed and epoch."""
    rng = np.random.default_rng((seed, epoch))
    indices = rng.permutation(len(lengths))
    batches_a_pool = min(50, max(1, len(indices) // (4 * size)))
    pool = np.arange(len(indices)) // (size * batches_a_pool)
    indices = indices[np.lexsort((-lengths[indices], pool))]       # by length within each pool
    batches = [indices[at:at + size] for at in range(0, len(indices), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(lengths, prompt_length, positions=4096):
    """Indices (B,) of each batch, the longest first, of about so many positions each."""
    indices = np.argsort(-lengths, kind="stable")
    batches = []
    while len(indices):
        size = max(1, positions // (int(lengths[indices[0]]) + prompt_length))
        batches.append(indices[:size])
        indices = indices[size:]
    return batches


# ------------------------------------------------------------------------- Training and evaluation

def loss_of(logits, classes):
    """The mean cross-entropy of logits (B, C)."""
    return F.cross_entropy(logits, classes)


def predict(model, sentences, title=""):
    """Logits (N, C) of all sentences, in their order; on a terminal a bar with this title."""
    model.eval()
    prompt_length = len(model.prompt())
    batches = evaluation_batches(sentences.lengths, prompt_length)
    sizes = sentences.lengths + prompt_length
    parts = []
    with torch.no_grad(), progress_bar(title, sizes.sum()) as bar:
        for indices in batches:
            ids, mask, _ = sentences.batch(indices)
            with fast(model):
                parts.append(model(ids, mask))                             # (B, C)
            bar.update(sizes[indices].sum())
    order = np.argsort(np.concatenate(batches))
    return torch.cat(parts)[torch.as_tensor(order).to(sentences.ids.device)]


def evaluate(model, sentences, title="test"):
    """({code: accuracy in percent}, mean loss, predicted classes (N,)) on Sentences."""
    codes = np.unique(sentences.languages).tolist()
    logits = predict(model, sentences, f"{title}: {len(codes)} language{'s' * (len(codes) > 1)}")
    loss = loss_of(logits, sentences.classes).item()
    predicted = logits.argmax(-1).cpu().numpy()
    right = predicted == sentences.classes.cpu().numpy()
    accuracy = {}
    for code in codes:
        accuracy[code] = float(100 * right[sentences.languages == code].mean())
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
    return cfg.lr, cfg.weight_decay                # PAPER 4.4: the pseudo prompt is in the encoder


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
    """Set the rates of this step, from 0; -> the one of prompt encoder and head."""
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
    """One update on a batch of Sentences; -> its loss, on the device: no step waits for it."""
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
        # PAPER 4.4: after the first cycle.  AUTHORS: the epochs from half-time on, among themselves
        late = [epoch["dev_loss"] for epoch in self.curve if epoch["step"] >= cfg.steps // 2]
        waited = len(late) - 1 - late.index(min(late)) if late else 0
        return bool(self.curve) and (self.step >= cfg.steps or waited >= cfg.patience)

    def record(self, epoch, model):
        """Note an epoch; the model with the best dev accuracy is kept, the earlier of equals."""
        best = max((other["dev_accuracy"] for other in self.curve), default=-1)
        if epoch["dev_accuracy"] > best:
            self.best = {name: tensor.clone() for name, tensor in trainable(model).items()}
        self.curve.append(epoch)


def check_finite(losses, batches, sentences, step):
    """The losses of an epoch that ended at `step`, as floats; here the host waits for the device.

    Raises FloatingPointError that names the step and its languages.
    """
    losses = [loss.item() for loss in losses]
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            languages = ", ".join(sorted(set(sentences.languages[batches[i]])))
            number = step - len(losses) + i + 1
            raise FloatingPointError(f"step {number}: loss {loss} on {languages}; "
                                     "the last checkpoint is kept")
    return losses


def train(model, sentences, dev, cfg, folder=None, test_tokens=0):
    """Train on Sentences, keep what is best on the Sentences `dev`; -> Progress.

    An evaluation and a checkpoint in `folder` (a RunFolder) end each epoch; a checkpoint that is
    there is gone on from, to the last bit.  test_tokens: how many are tested later, for the
    estimate of the time left.  Raises FloatingPointError where a loss is not finite.
    """
    optimizer = Adafactor(parameter_groups(model, cfg), cfg.lr)
    progress = folder.resume(model, optimizer) if folder else Progress()
    log = Log(cfg, progress, test_tokens / dev.lengths.sum())
    began = time.monotonic() - progress.seconds
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
        losses = check_finite(losses, batches, sentences, progress.step)

        _, dev_loss, predicted = evaluate(model, dev, "dev")
        if not math.isfinite(dev_loss):            # the epoch's last update broke it
            raise FloatingPointError(f"step {progress.step}: dev loss {dev_loss}; "
                                     "the last checkpoint is kept")
        classes = dev.classes.cpu().numpy()
        progress.seconds = time.monotonic() - began
        progress.record(dict(
            epoch=epoch + 1, step=progress.step, loss=sum(losses) / max(1, len(losses)),
            dev_loss=dev_loss, lr=rate, dev_accuracy=float(100 * np.mean(predicted == classes)),
            majority=float(100 * np.bincount(classes).max() / len(classes))), model)
        if folder:
            folder.save_checkpoint(model, optimizer, progress)
        log.epoch(progress, len(set(predicted.tolist())))

    log.bar.close()
    copy_into(model, progress.best)
    return progress


# ----------------------------------------------------------------------------------------- One run

def run(cfg, wait=False):
    """One run, from its config to result.json; -> the result.  A finished run is only reported.

    wait: where another process is at work on the same run, wait for it; else InputError.
    """
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
        encode(examples, task.labels, tokenizer, cfg.device, cfg.max_length)
        for examples in (task.train, task.dev, task.test))
    trained = sum(p.numel() for p in trainable(model).values())
    share = trained / sum(p.numel() for p in model.parameters())
    print(f"{trained:,} parameters train ({share:.2%}) on {len(task.train):,} sentences, "
          f"{len(task.labels)} labels; {cfg.dtype}, {cfg.device}")

    progress = train(model, sentences, dev, cfg, folder, test.lengths.sum())
    model.cache_prompt()
    accuracy, _, predicted = evaluate(model, test, "test")

    folder.save_result(model, task, predicted, dict(
        seconds=progress.seconds,
        trainable_parameters=trained,
        dev_accuracy=max(epoch["dev_accuracy"] for epoch in progress.curve),
        accuracy=accuracy,
        groups=groups.group_means(accuracy),
        dev_curve=progress.curve,
    ))


# ==================================================================================================
# Part II: what makes it fast, safe and handy.  Nothing in it is needed to understand the method.
# ==================================================================================================


# ------------------------------------------------------------------------------------------- Speed

LIKE_XLM_R = ("bert", "camembert", "roberta", "xlm-roberta")       # layers that FastOnCPU knows


def fast(model):
    """A context in which a model computes the same in less time; without it no result changes."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return FastOnCPU(model) if on_cpu else contextlib.nullcontext()


class FastOnCPU(torch.overrides.TorchFunctionMode):
    """Saves the last layer's unread positions, and most of the random numbers of dropout.

    Behind its attention the last layer goes on with position 0 alone where only that is read.
    A mode of torch holds for one thread and registers nothing, so that models can share a backbone.
    """

    def __init__(self, model):
        super().__init__()
        self.dense = self.norm = None
        if model.pool == "first" and model.backbone.config.model_type in LIKE_XLM_R:
            behind_attention = model.backbone.encoder.layer[-1].attention.output
            self.dense = behind_attention.dense.weight
            self.norm = behind_attention.LayerNorm.weight

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            return fast_dropout(*args, **kwargs)
        if self.dense is not None:
            dense = function is F.linear and args[1] is self.dense
            norm = function is F.layer_norm and kwargs.get("weight") is self.norm
            if dense or norm:
                args = (args[0][:, :1], *args[1:])             # (B, P + T, H) -> (B, 1, H)
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

def progress_bar(title, total, done=0):
    """A bar, drawn once a second; none without a title, or where there is no terminal.

    The time left is by the mean speed, and so counts what comes between the steps.
    """
    return tqdm(total=total, initial=done, leave=False, disable=None if title else True,
                dynamic_ncols=True, miniters=1, mininterval=1, smoothing=0,
                bar_format=title + " |{bar}| {elapsed}, left {remaining}{postfix}")


class Log:
    """What a person sees of a training: a row an epoch, and on a terminal a bar over all steps."""

    HEADER = "epoch   step   loss dev loss dev acc. majority      lr seconds   left then test"
    ROW = ("{epoch:5d} {step:6d} {loss:6.3f} {dev_loss:8.3f} {dev_accuracy:7.1f}% "
           "{majority:7.1f}% {lr:7.1e}")

    def __init__(self, cfg, progress, test_share):
        self.steps = cfg.steps
        self.test_share = test_share               # tokens to be tested later, of dev's
        self.accuracies = [epoch["dev_accuracy"] for epoch in progress.curve]
        self.last_step = time.monotonic()
        print(self.HEADER)
        self.bar = progress_bar("step {n}/{total}", cfg.steps, progress.step)

    def step(self, loss, rate):
        """After each step; where the bar is drawn, the device is waited for."""
        self.last_step = time.monotonic()
        if self.bar.update():
            dev = "".join(f" dev {accuracy:.1f}%" for accuracy in self.accuracies[-1:])
            self.bar.set_postfix_str(f"loss {loss.item():.3f} lr {rate:.1e}{dev}")

    def epoch(self, progress, classes):
        """After each epoch; `classes`: how many of them were predicted on dev."""
        row = progress.curve[-1]
        self.accuracies.append(row["dev_accuracy"])
        left = progress.seconds * (self.steps / max(1, progress.step) - 1)
        test = (time.monotonic() - self.last_step) * self.test_share
        line = self.ROW.format(**row) + f" {progress.seconds:7.0f} {left:6.0f} {test:9.0f}"
        tqdm.write(line, file=sys.stdout)
        if classes == 1:
            tqdm.write("      warning: all of dev is predicted as one class; more steps or other "
                       "rates?", file=sys.stdout)


# ------------------------------------------------------------------------------------------- Files

@contextlib.contextmanager
def as_input_error(problem, remedy=""):
    """Turn what a library raises inside into an InputError: problem (its first line), remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:                     # of many kinds, which mean the same to a user
        raise InputError(f"{problem} ({describe(error)}){remedy}") from error


def describe(error):
    """The first line of an error, and its kind."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {reason[:200]}"


def write_file(path, content):
    """Bytes or text into `path` by way of a temporary name: it is the old file or the new one."""
    path = Path(path)
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
        with contextlib.suppress(OSError):         # it would keep a full disk full
            temporary.unlink()
        raise OSError(f"cannot write {path} ({describe(error)})") from error


def csv_text(header, rows):
    """Rows as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
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
        kept["init_from"] = os.path.relpath(cfg.init_from, cfg.out)
    return kept


def run_name(cfg):
    """The name of a run's folder, such as dual70-joshi5-s0 or toy-xpe-eng_Latn-kab_Latn-s1."""
    kind = "toy-" if cfg.toy else ""
    share = round(100 * cfg.xpe_ratio) if cfg.method == "dual" else ""
    languages = cfg.source[:100] + ("-" + cfg.target[:100] if cfg.target else "")
    return f"{kind}{cfg.method}{share}-{languages.replace(',', '+')}-s{cfg.seed}"


class RunFolder:
    """The folder of one run.  What another run left in it is refused with an InputError."""

    def __init__(self, cfg, task):
        self.path = Path(cfg.out, run_name(cfg))
        self.made_from = dict(config=definition(cfg), digests=task.digests)
        above = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise InputError(f"--out {cfg.out}: {above} is no folder that can be written to")
        self.result() or self.checkpoint()         # refused before anything slow

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
        path = self.path / "result.json"
        if not path.exists():
            return None
        return self.compared(groups.read_result(path))

    def checkpoint(self):
        """What checkpoint.pt holds, None before the first epoch has ended."""
        path = self.path / "checkpoint.pt"
        return self.compared(read_checkpoint(path)) if path.exists() else None

    def compared(self, theirs):
        """A file's content, if it is of this run.  Raises InputError that names what differs."""
        there = {**theirs["config"], **theirs.get("digests", {})}
        here = {**self.made_from["config"], **self.made_from["digests"]}
        differ = [f"{key} ({there.get(key)} there, {here[key]} here)"
                  for key in here if there.get(key) != here[key]]
        if differ:
            raise InputError(f"{self.path} was made with other settings: {', '.join(differ)}; "
                             "choose another --out")
        return theirs

    def resume(self, model, optimizer):
        """Put the checkpoint, if any, into model, optimizer and torch's dice; -> Progress."""
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
        self.save_log(progress)                    # a kill may have come before it
        return progress

    def save_checkpoint(self, model, optimizer, progress):
        """Everything needed to go on, and log.csv."""
        content = dict(
            self.made_from,
            progress=vars(progress),
            model=trainable(model),
            optimizer=optimizer.state_dict(),
            rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state_all(),
            threads=torch.get_num_threads(),
        )
        memory = io.BytesIO()
        torch.save(content, memory)
        write_file(self.path / "checkpoint.pt", memory.getbuffer())
        self.save_log(progress)

    def save_log(self, progress):
        """log.csv: a row an epoch."""
        rows = [epoch.values() for epoch in progress.curve]
        write_file(self.path / "log.csv", csv_text(progress.curve[0], rows))

    def save_result(self, model, task, predicted, result):
        """Predictions, adapter and, last of all, result.json."""
        config = self.made_from["config"]
        rows = [(example.code, example.row, example.label, task.labels[i])
                for example, i in zip(task.test, predicted)]
        header = ("language", "row", "label", "predicted")
        write_file(self.path / "predictions.csv", csv_text(header, rows))
        if config["method"] != "full" and model.pool == "first":
            save_adapter(model, self.path / "adapter", config["backbone"], dict(
                method=config["method"], xpe_ratio=config["xpe_ratio"], labels=task.labels,
                languages=sorted({example.code for example in task.train}),
                max_length=config["max_length"], groups=result["groups"]))
        versions = dict(python=sys.version.split()[0], torch=torch.__version__)
        result = dict(self.made_from, versions=versions, labels=task.labels, **result)
        write_file(self.path / "result.json", json.dumps(result, indent=1))

    def tidy(self):
        """Remove what nothing starts from: the 4.5 GB of XLM-R large that was fine-tuned."""
        if self.made_from["config"]["method"] == "full":
            (self.path / "checkpoint.pt").unlink(missing_ok=True)


def read_checkpoint(path):
    """What save_checkpoint wrote, read without unpickling code.  Raises InputError."""
    with as_input_error(f"{path}: not a checkpoint of this program", "; choose another --out"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key in ("config", "digests", "progress", "model", "optimizer"):
            checkpoint[key].keys()                 # all of them are dicts
    return checkpoint


# ---------------------------------------------------------------------------------------- Adapters
# Prompt and head as PEFT loads them.  Needs json, torch, NamedTuple, Path, InputError, and the
# sections The prompts and Files.

HEAD = "base_model.classifier."                    # PEFT's name for the head; its Linears follow
ENCODER = "prompt_encoder."                        # the authors' name for what makes the prompt
MLP = ENCODER + "xpe_head."                        # theirs for the MLP; places in it follow
SAME_HEAD = ("camembert", "roberta", "xlm-roberta")                # where PEFT's head is this one
OURS = "XPE_PROMPT"                                # peft_type elsewhere, which PEFT refuses


class Adapter(NamedTuple):
    """An adapter as its files have it."""
    config: dict                  # PEFT's adapter_config.json
    labels: list                  # names of the classes in order, [] where nobody knows
    tensors: dict                 # {name in the file: tensor}
    free: str                     # name of the finished or free vectors, "" without
    pseudo: str                   # name of the pseudo prompt, "" without
    length: int                   # P


def save_adapter(model, folder, base="", facts=None):
    """Write prompt (P, H) and head as an adapter for the backbone `base`; `facts` go into xpe.json.

    It is PEFT's PROMPT_TUNING where PEFT's head is XLM-R's too; else of a type that PEFT refuses.
    Raises InputError unless the head reads position 0, as PEFT's does.
    """
    from safetensors.torch import save
    if model.pool != "first":
        raise InputError(f"PEFT's head reads position 0: pool {model.pool!r} is no adapter")
    model.eval()                                   # the prompt without dropout
    tensors = {"prompt_embeddings": model.prompt()}
    for name, parameter in model.head.named_parameters():
        tensors[HEAD + name] = parameter
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    backbone = model.backbone.config
    config = dict(
        peft_type="PROMPT_TUNING",
        task_type="SEQ_CLS",                       # without it PEFT takes a random head, in silence
        base_model_name_or_path=base,
        num_virtual_tokens=len(tensors["prompt_embeddings"]),
        token_dim=tensors["prompt_embeddings"].shape[1],
        num_transformer_submodules=1,
        num_attention_heads=backbone.num_attention_heads,
        num_layers=backbone.num_hidden_layers,
        modules_to_save=["classifier"],
        prompt_tuning_init="RANDOM",
        inference_mode=True,
    )
    if backbone.model_type not in SAME_HEAD:
        config["peft_type"] = OURS
    folder = Path(folder)
    write_file(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_file(folder / "adapter_config.json", json.dumps(config, indent=1))
    write_file(folder / "xpe.json", json.dumps(facts or {}, indent=1))


def read_adapter(folder):
    """The Adapter in a folder.  Raises InputError, by name, for what cannot be right."""
    from safetensors.torch import load
    folder = Path(folder)
    facts, safe = folder / "xpe.json", folder / "adapter_model.safetensors"
    with as_input_error(f"{folder}: not a readable adapter"):
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        facts = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
        labels = facts.get("labels", [])
        if type(labels) is not list or len({x for x in labels if type(x) is str}) < len(labels):
            raise TypeError(f"labels are {labels}, which are no distinct names")
        if config["peft_type"] not in ("PROMPT_TUNING", "P_TUNING", "XPE", OURS):
            raise TypeError(f"an adapter of type {config['peft_type']} holds no soft prompt")
        if safe.exists():
            tensors = load(safe.read_bytes())
        else:                                      # PEFT before 0.7
            tensors = torch.load(folder / "adapter_model.bin", map_location="cpu",
                                 weights_only=True)
        for name, tensor in tensors.items():
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise ValueError(f"{name} is larger than what is stored of it")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has a value that is not finite")
        free, pseudo = prompt_names(tensors)
        vectors = sum(len(tensors.get(name, ())) for name in (free, pseudo))
        stated = config["num_virtual_tokens"]
        if vectors and (type(stated), stated) != (int, vectors):
            raise ValueError(f"{vectors} vectors, where num_virtual_tokens is {stated!r}")
        encoder = config.get("encoder_reparameterization_type", "MLP")
        if pseudo and encoder != "MLP":
            raise TypeError(f"its prompt encoder is of type {encoder}, not an MLP")
    return Adapter(config, labels, tensors, free, pseudo, vectors)


def prompt_names(tensors):
    """(name of the finished or free vectors, name of the pseudo prompt) in an adapter, or ""."""
    free, pseudo = ENCODER + "embedding.weight", ENCODER + "xpe_embedding.weight"
    if free not in tensors and pseudo not in tensors:
        return "prompt_embeddings", ""             # finished: PEFT's, ours
    if pseudo in tensors:
        return (free if free in tensors else ""), pseudo
    if any(name.startswith(MLP) for name in tensors):
        return "", free                            # AUTHORS: XPE, before November 2025
    return free, ""                                # AUTHORS: SPT


def load_adapter(folder, backbone):
    """A PromptedClassifier from our folder, PEFT's PROMPT_TUNING or P_TUNING, or the authors' own,
    whose prompt still has its encoder.  Raises InputError that names a tensor and both shapes."""
    adapter = read_adapter(folder)
    hidden = backbone.get_input_embeddings().weight.shape[1]
    if adapter.config["peft_type"] != OURS and backbone.config.model_type not in SAME_HEAD:
        raise InputError(f"{folder}: PEFT's head for {backbone.config.model_type} is not XLM-R's")

    def rows(name):
        tensor = adapter.tensors.get(name)
        return len(tensor) if tensor is not None and tensor.dim() else 0

    free, pseudo = rows(adapter.free), rows(adapter.pseudo)
    parts = []
    if adapter.free:
        parts.append(SoftPrompt(free, hidden))
    if adapter.pseudo:
        parts.append(CrossPromptEncoder(pseudo, hidden, rows(MLP + "0.weight") or 1))
    prompt = DualPrompt(*parts) if len(parts) == 2 else parts[0]
    model = PromptedClassifier(backbone, prompt, rows(HEAD + "out_proj.weight") or 1)
    model.to(backbone.device)

    parameters = adapter_parameters(model, adapter)
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    there = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    wrong = [f"{name}: {there.get(name, 'missing')}, where {here.get(name, 'none')} is wanted"
             for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
    if wrong:
        raise InputError(f"{folder}: {'; '.join(wrong)}")
    for name, parameter in parameters.items():
        parameter.data.copy_(adapter.tensors[name])
    return model.eval()


def adapter_parameters(model, adapter):
    """{name in the adapter's file: parameter of the model}."""
    found = {HEAD + name: parameter for name, parameter in model.head.named_parameters()}
    for module in model.prompt.modules():
        if isinstance(module, SoftPrompt):
            found[adapter.free] = module.vectors
        if isinstance(module, CrossPromptEncoder):
            found[adapter.pseudo] = module.pseudo_prompt
            for name, parameter in module.mlp.named_parameters():
                found[MLP + name] = parameter
    return found


# ---------------------------------------------------------------------------- Loading and checking

def check_settings(cfg):
    """Put defaults where nobody said anything.  Raises InputError for what can be told at once."""
    if cfg.load and not cfg.toy:
        cfg.backbone = cfg.backbone or ""          # the adapter knows
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value is None:
            setattr(cfg, field.name, field.metadata["toy" if cfg.toy else "default"])
        else:
            check_value(field, value)
    check_method(cfg)
    if cfg.predict and not cfg.load:
        raise InputError("--predict needs --load, the folder of an adapter")
    if cfg.weight_decay is None:
        cfg.weight_decay = 0.01 if cfg.recipe == "released" else 0.1       # PAPER 4.4: 0.1
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    with as_input_error(f"--device {cfg.device}: not on this machine", "; use cpu or auto"):
        there = torch.zeros(1, device=cfg.device)
        there.item()                               # meta, for one, has nothing in it
        cfg.device = str(there.device)
    if cfg.dtype == "auto":
        cfg.dtype = "bf16" if cfg.device.startswith("cuda") and cfg.method != "full" else "fp32"


def check_value(field, value):
    """Raise InputError unless a setting's value is within its bounds or choices."""
    flag = "--" + field.name.replace("_", "-")
    choices, least, below = (field.metadata[key] for key in ("choices", "least", "below"))
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=9, cutoff=0)
        raise InputError(f"{flag} {value!r}: choose from {', '.join(near)}")
    if field.type in (int, float) and not least <= value < below:
        raise InputError(f"{flag} {value}: must lie in [{least}, {below})")


def check_method(cfg):
    """Fill in share and length of the prompt; raise InputError for what a method has no use for."""
    if cfg.method == "full" and (cfg.prompt_length or cfg.target or cfg.dtype == "bf16"):
        raise InputError("--method full takes no --prompt-length and no --target (train on a "
                         "target with --source CODE), and trains in fp32, not in bf16")
    if cfg.prompt_length is None:
        cfg.prompt_length = 0 if cfg.method == "full" else 20
    shortest = {"full": 0, "dual": 2}.get(cfg.method, 1)
    if cfg.prompt_length < shortest:
        raise InputError(f"--prompt-length {cfg.prompt_length}: {cfg.method} needs {shortest}")
    share = SHARES[cfg.method]
    cfg.xpe_ratio = share if cfg.xpe_ratio is None else cfg.xpe_ratio
    if cfg.method != "dual" and cfg.xpe_ratio != share:
        raise InputError(f"--xpe-ratio belongs to --method dual; {cfg.method} has none")
    if cfg.method == "dual" and not 0 < cfg.xpe_ratio < 1:
        raise InputError(f"--xpe-ratio {cfg.xpe_ratio:g}: must lie between 0 (spt) and 1 (xpe)")


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
        words, rows = len(tokenizer), len(backbone.get_input_embeddings().weight)
    lacking += [key for key, p in backbone.named_parameters() if not p.sum().isfinite()]
    if lacking:
        raise InputError(f"the files of {name} do not fill the encoder: {', '.join(lacking[:3])} "
                         "lack or are not finite")
    if not rows / 2 <= words <= rows or tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer of {name} is not the encoder's: it has {words} tokens, "
                         f"the encoder {rows}, and padding is {tokenizer.pad_token}")
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
    safe = dict(trust_remote_code=False)           # a foreign adapter may name any backbone
    config = AutoConfig.from_pretrained(name, return_dict=True, **safe)
    config.chunk_size_feed_forward = 0             # the same numbers, for texts of every length
    config.gradient_checkpointing = False          # it would go backward without FastOnCPU
    if torch.device(device).type == "cpu" and dtype == torch.bfloat16:
        safe["attn_implementation"] = "eager"      # there alone the fused one's gradient is slow
    backbone, report = AutoModel.from_pretrained(name, config=config, dtype=dtype,
                                                 output_loading_info=True, **safe)
    if hasattr(backbone, "decoder"):               # of T5 and BART: the other half
        backbone = backbone.get_encoder()
    if hasattr(backbone, "pooler"):
        backbone.pooler = nn.Identity()      # nobody reads it
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", trust_remote_code=False)
    unread = ("pooler", "decoder")
    lacking = [key for key in report["missing_keys"] if key.split(".")[0] not in unread]
    return backbone, tokenizer, sorted(lacking)


@torch.no_grad()
def check_model(model, cfg):
    """Try a model on texts of the full length.  Raises InputError unless the position that is read
    sees their end, no padding changes it, and tokens and their vectors give the same; in fp32,
    since bf16 is too coarse to tell."""
    model.eval()
    dtype = model.backbone.dtype
    set_precision(model.backbone, torch.float32)
    half = cfg.max_length // 2
    places = torch.arange(cfg.max_length, device=cfg.device)[None]         # (1, T)
    ids, mask, front = 10 + places % 8, torch.ones_like(places), (places < half).long()
    other = ids + 1 - front                        # other words in the second half
    with as_input_error(f"--backbone {cfg.backbone} cannot be prompted"):
        blind = torch.equal(model(ids, mask), model(other, mask))
        short = model(ids[:, :half], mask[:, :half])
        padded = model(ids, front)                 # whatever is behind the text
        vectors = model.backbone.get_input_embeddings()(ids)
        by_ids = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        by_vectors = model.backbone(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
        set_precision(model.backbone, dtype)
        model(ids, mask)
    if blind:
        raise InputError(f"--backbone {cfg.backbone}: the position that the head reads does not "
                         "see the text behind it, as in a decoder; an encoder is needed")
    if not alike(short, padded):
        raise InputError(f"--backbone {cfg.backbone}: its results depend on padding")
    if not alike(by_ids, by_vectors):
        raise InputError(f"--backbone {cfg.backbone}: it treats vectors unlike the tokens that "
                         "they are of")


def alike(a, b):
    """Are two results equal to what fp32 allows?"""
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max())


def set_precision(module, dtype):
    """Change its parameters alone: numbers such as the angles of rotary positions stay in fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def width(backbone):
    """Size of the vectors that a backbone takes as its input, H with XLM-R."""
    return backbone.get_input_embeddings().weight.shape[1]


def count_positions(backbone):
    """How many positions prompt and text may take, infinite where they are not numbered."""
    for name, module in backbone.named_modules():
        if "position" in name and isinstance(module, nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1       # XLM-R: 2
            return module.num_embeddings - before
    return math.inf


def available_codes(data):
    """The language codes in `data`.  Raises InputError where there is no such folder."""
    if data == "toy":
        return list(groups.LANGUAGES)
    codes = {path.parent.name for path in Path(data).glob("[!.]*/*.tsv")}
    if codes:
        return sorted(codes)
    if Path(data).is_dir():
        from datasets import get_dataset_config_names
        with as_input_error(f"--data {data}: neither <code>/train.tsv nor a data set in it"):
            names = sorted(get_dataset_config_names(data))
        if names == ["default"] and any(Path(data).glob("[!.]*/train.csv")):
            raise InputError(f"--data {data}: train.csv is there: write train.tsv, with tabs")
        return names
    if data.startswith((".", "/", "~")):
        raise InputError(f"--data {data}: no such folder")
    return list(groups.LANGUAGES)                  # the hub's SIB-200


class Example(NamedTuple):
    """A sentence of a data set."""
    text: str
    label: str
    code: str                     # of its language
    row: int                      # its number in the language's file, from 0


def read_tsv(path):
    """[(place, text, label)] of a TSV file as SIB-200's are: CSV with tabs, quoted where needed."""
    csv.field_size_limit(2**30)
    rows, line = [], 1
    try:
        content = path.read_bytes().decode("utf-8-sig")                    # with or without a mark
        reader = csv.DictReader(io.StringIO(content, newline=""), delimiter="\t", strict=True)
        columns = reader.fieldnames or []
        if columns.count("category") != 1 or columns.count("text") != 1:
            raise InputError(f"{path}:1: the columns are {columns}; one must be category, one text")
        for row in reader:
            line = reader.line_num
            read = f"{row['category']} {row['text']}"
            if None in row or "\t" in read and "\n" in read:              # a quote swallowed rows
                raise InputError(f"{path}:{line}: more columns than the header has; put a text "
                                 "that holds a tab, or begins with a quote, in quotes")
            rows.append((f"{path}:{line}", row["text"], row["category"]))
    except UnicodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 ({describe(error)})") from None
    except csv.Error as error:
        raise InputError(f"{path}, behind line {line}: {describe(error)}; put a text that begins "
                         "with a quote in quotes, and double those inside") from None
    except OSError as error:
        other = path.with_suffix(".csv")
        hint = f"; {other.name} is there: write it with tabs" if other.exists() else ""
        raise InputError(f"{path}: cannot be read ({describe(error)}){hint}") from None
    return rows


def read_rows(data, code, split):
    """[(place, text, label)] from a TSV folder, the hub, or a local folder for load_dataset."""
    if data == "toy":
        return toy_rows(code, split)
    path = Path(data, code, split + ".tsv")
    if any(Path(data).glob("[!.]*/*.tsv")):
        return read_tsv(path)
    remedy = "; offline, give a local folder with --data DIR, or --toy"
    problem = f"cannot read {code}, {split}, of {data}"
    with as_input_error(problem, remedy), tempfile.TemporaryDirectory() as fresh:
        import datasets
        datasets.disable_progress_bars()
        ask_hub_once(data, "README.md", "dataset")
        cache = fresh if Path(data).exists() else None     # theirs does not see that a file changed
        table = datasets.load_dataset(data, code, split={"dev": "validation"}.get(split, split),
                                      cache_dir=cache)
        name_of = getattr(table.features["category"], "int2str", lambda label: label)
        return [(f"{path} row {i}", row["text"], name_of(row["category"]))
                for i, row in enumerate(table)]


def load_language(data, code, split, labels=None):
    """Texts and label names of one language; `split` is train, dev or test, `data` as in Config.

    With `labels`, every label must be one of them.  Raises InputError that names file and line.
    """
    texts, found = [], []
    for place, text, label in read_rows(data, code, split):
        text, label = ("" if value is None else str(value) for value in (text, label))
        label = label.strip()
        if not text.strip():
            raise InputError(f"{place}: empty text")
        if not label or labels and label not in labels:
            raise InputError(f"{place}: unknown label {label!r}; known: {', '.join(labels or [])}")
        texts.append(text)
        found.append(label)
    if not texts:
        raise InputError(f"no {split} rows for {code} in {data}")
    return texts, found


def load_examples(data, codes, split, labels=None):
    """[Example] of several languages, one after the other; the rest as in load_language."""
    examples = []
    for code in codes:
        texts, found = load_language(data, code, split, labels)
        examples += [Example(*pair, code, row) for row, pair in enumerate(zip(texts, found))]
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
    available = available_codes(cfg.data)
    sources = groups.resolve(cfg.source, available, f"--data {cfg.data}")
    targets = groups.resolve(cfg.target, available, f"--data {cfg.data}") if cfg.target else sources
    tested = groups.resolve(cfg.languages, available, f"--data {cfg.data}")

    found = {example.label for example in load_examples(cfg.data, sources, "train")}
    known = set(groups.LABELS)
    labels = sorted(known if found > known else found)     # an eighth in SIB-200 is a slip
    train = load_examples(cfg.data, targets, "train", labels)
    dev = load_examples(cfg.data, targets, "dev", labels)
    test = load_examples(cfg.data, tested, "test", labels)
    sentences = hashlib.sha256(repr((train, dev, test, labels)).encode()).hexdigest()[:12]
    digests = dict(sentences=sentences, encoder=encoder_digest(cfg.backbone))
    return Task(train, dev, test, labels, digests)


def encoder_digest(name):
    """A digest of a local encoder's files: names, sizes and, to be quick, a sample of each."""
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("*.*")):
        if path.suffix not in (".json", ".safetensors", ".bin", ".model", ".txt"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(64):
                file.seek(size * part // 64)
                digest.update(file.read(256))
    return digest.hexdigest()[:12]


def backbone_of(cfg):
    """A config's backbone and tokenizer.  Raises InputError where they do not serve it."""
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    backbone, tokenizer = load_backbone(cfg.backbone, cfg.device, dtype)
    room = count_positions(backbone)
    if cfg.prompt_length + cfg.max_length > room:
        raise InputError(f"--prompt-length {cfg.prompt_length} + --max-length {cfg.max_length}: "
                         f"more than the {room} positions of {cfg.backbone}")
    whole, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    if cfg.pool == "bos" and whole[:1] == bare[:1]:
        raise InputError(f"--pool bos: texts begin with no special token in {cfg.backbone}")
    return backbone, tokenizer


def build_model(cfg, labels):
    """The model that a config starts from, and its tokenizer.  Raises InputError."""
    backbone, tokenizer = backbone_of(cfg)
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
    with as_input_error(f"--init-from {folder}: does not fit",
                        "; a run must be finished, --method and length the same; a finished prompt "
                        "has no encoder and goes on as --method spt"):
        if (folder / "adapter_config.json").exists():
            tensors = trainable(load_adapter(folder, model.backbone))
            theirs = class_names(folder, cfg.labels)
            pool, source = "first", cfg.source
        else:
            tensors = read_checkpoint(folder / "checkpoint.pt")["progress"]["best"]
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            theirs, pool, source = (result["labels"], result["config"]["pool"],
                                    result["config"]["source"])
        if pool != cfg.pool or cfg.target and source != cfg.source:
            raise InputError(f"--init-from {folder}: it was trained with --source {source} "
                             f"--pool {pool}")
        if set(theirs) != set(labels):
            raise InputError(f"--init-from {folder}: its labels are {', '.join(theirs)}, not "
                             f"{', '.join(labels)}")
        order = [theirs.index(label) for label in labels]          # a class is known by its name
        for name in ("head.out_proj.weight", "head.out_proj.bias"):
            tensors[name] = tensors[name][order]
        copy_into(model, tensors)


def class_names(folder, said=""):
    """The names of an adapter's classes, in order: those `said` (a,b,c), else its own, else guessed
    with a note.  Raises InputError where they are not as many as its classes."""
    adapter = read_adapter(folder)
    labels = said.split(",") if said else adapter.labels
    if not labels and adapter.free != "prompt_embeddings":
        labels = list(groups.SIB200_ORDER)         # AUTHORS: the data set's own, no alphabet
    if not labels:
        labels = sorted(groups.LABELS)
        print(f"{folder} names no labels: SIB-200's are taken, in alphabetical order; --labels "
              "says others", file=sys.stderr)
    classes = len(adapter.tensors[HEAD + "out_proj.bias"])
    if len(set(labels)) != classes:
        raise InputError(f"{folder}: its head has {classes} classes, and {len(set(labels))} are "
                         f"named: {', '.join(labels)}")
    return labels


# ----------------------------------------------------------------------------------------- The toy

def toy_backbone():
    """A random two-layer XLM-R over 70 topic words, 50 filler and 300 foreign ones, and its
    tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel
    words = ["<s>", "<pad>", "</s>", "<unk>"]
    words += [f"topic{i}" for i in range(70)]
    words += [f"filler{i}" for i in range(50)]
    words += [f"foreign{i}" for i in range(300)]
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 0), ("</s>", 2)]
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
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

def transfer(cfg):
    """Sequential transfer (4.1): a source run, then each target alone, from its prompt and head."""
    target_configs = configs_of_targets(cfg)
    for target in target_configs:                  # before the source run, which takes long
        read_task(target)
    if not cfg.init_from:
        run(dataclasses.replace(cfg, target=""), wait=True)
    for target in target_configs:
        run(target)


def configs_of_targets(cfg):
    """The config of the run on each language of --target."""
    start = cfg.init_from or str(Path(cfg.out, run_name(dataclasses.replace(cfg, target=""))))
    codes = groups.resolve(cfg.target, available_codes(cfg.data), f"--data {cfg.data}")
    return [dataclasses.replace(cfg, target=code, languages=code, init_from=start,
                                steps=cfg.target_steps, warmup=cfg.target_warmup,
                                dropout=cfg.target_dropout, patience=cfg.target_patience)
            for code in codes]


def finished(cfg):
    """Is all that a config asks for there already?  What would be refused is not finished."""
    try:
        configs = configs_of_targets(cfg) if cfg.target else [cfg]
        return all(RunFolder(one, read_task(one)).result() for one in configs)
    except InputError:
        return False


def use_adapter(cfg):
    """--load: accuracy of an adapter per language; with --predict, a label for each line."""
    adapter = read_adapter(cfg.load)
    base = adapter.config.get("base_model_name_or_path") or "FacebookAI/xlm-roberta-large"
    cfg = dataclasses.replace(cfg, backbone=cfg.backbone or base, method="spt", xpe_ratio=None,
                              prompt_length=max(1, adapter.length))
    backbone, tokenizer = backbone_of(cfg)
    model = load_adapter(cfg.load, backbone).cache_prompt()
    check_model(model, cfg)
    labels = class_names(cfg.load, cfg.labels)

    def encoded(examples):
        return encode(examples, labels, tokenizer, cfg.device, cfg.max_length)

    if not cfg.predict:
        codes = groups.resolve(cfg.languages, available_codes(cfg.data), f"--data {cfg.data}")
        examples = load_examples(cfg.data, codes, "test", labels)
        accuracy, _, _ = evaluate(model, encoded(examples), "test")
        groups.print_result(dict(config=definition(cfg), accuracy=accuracy))
        return
    for lines in read_lines(cfg.predict):
        texts = [Example(line, labels[0], "", 0) for line in lines]
        shares, classes = predict(model, encoded(texts)).softmax(-1).max(-1)
        for line, share, label in zip(lines, shares.tolist(), classes.tolist()):
            print(f"{labels[label]}\t{share:.4f}\t{line}" if line.strip() else f"\t\t{line}")


def read_lines(path, size=256):
    """Lists of lines of a UTF-8 file, or of standard input for "-".  Raises InputError."""
    with as_input_error(f"--predict {path}: cannot be read"):
        file = sys.stdin.buffer if path == "-" else open(path, "rb")
    lines = []
    with file:
        for number, line in enumerate(file, 1):
            try:
                lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
            except UnicodeDecodeError:
                raise InputError(f"--predict {path}: line {number} is not UTF-8") from None
            if len(lines) == size:
                yield lines
                lines = []
    if lines:
        yield lines


def benchmark(cfg):
    """--benchmark: a training step and an evaluation batch, beside the layers' products alone.

    Texts of 36 random tokens; medians of 5 rounds, after one to warm up, of 8 batches in turns; a
    share is of the products' rate in the same round.  Operations are counted by torch.
    """
    model, _ = build_model(cfg, groups.LABELS)
    optimizer = Adafactor(parameter_groups(model, cfg), cfg.lr)
    size, indices = cfg.batch_size, np.arange(cfg.batch_size)
    ids = torch.randint(5, 400, (size, 36), device=cfg.device)
    sentences = Sentences(ids, torch.ones_like(ids), ids[:, 0] % 7, np.full(size, 36), indices)
    matrices = [p.detach() for p in model.backbone.encoder.parameters() if p.dim() == 2]
    x = torch.randn(size * (cfg.prompt_length + 36), max(matrices[0].shape[0], *matrices[-1].shape),
                    device=cfg.device, dtype=matrices[0].dtype)

    def products():
        for matrix in matrices:
            y = x[:, :matrix.shape[1]] @ matrix.T
        return y

    def training():
        set_training_mode(model, cfg)
        return train_step(model, sentences.batch(indices), optimizer, cfg.clip)

    def evaluation():
        return predict(model, sentences)

    works = (products, training, evaluation)
    rounds = np.array([[time_of(work) for work in works] for _ in range(6)])           # (6, 3)
    rates = [count_operations(work) for work in works] / rounds[1:] / 1e9              # (5, 3)
    shares = rates / rates[:, :1]
    medians = np.median([rounds[1:], rates, shares], axis=1)                           # (3, 3)
    print(f"a batch of {size:<5} {'ms':>8} {'sentences/s':>11} {'GFLOP/s':>8} share")
    for work, (seconds, rate, share) in zip(works, medians.T):
        print(f"{work.__name__:<16} {1000 * seconds:8.1f} {size / seconds:11.1f} {rate:8.0f} "
              f"{share:5.0%}")
    print(f"peak memory {peak_memory(cfg.device) / 2**30:.2f} GiB; {cfg.dtype}, {cfg.device}")


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
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1024 if sys.platform == "linux" else 1)         # macOS counts bytes


HELP_GROUPS = {  # the settings from which on --help has another title
    "method": "the method", "source": "the languages", "steps": "the training",
    "target_steps": "the training on each language of --target", "seed": "the run",
    "load": "instead of training"}


def parse(argv=None):
    """The command line as a Config.  Raises InputError."""
    parser = argparse.ArgumentParser(
        usage="python xpe.py [--option value ...]   (below, the values are the defaults)",
        description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):                            # argparse's own prints the usage too
        raise InputError(f"{message}; see --help")
    parser.error = error
    for field in dataclasses.fields(Config):
        if field.name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[field.name])
        flag, default = "--" + field.name.replace("_", "-"), field.metadata["default"]
        if field.type is bool:
            group.add_argument(flag, action="store_true", help=field.metadata["text"])
            continue
        group.add_argument(flag, type=field.type, help=field.metadata["text"],
                           metavar="..." if default in (None, "") else default)
    return Config(**vars(parser.parse_args(argv)))


def main(argv=None):
    """The command line; -> exit code: 0 done, 1 the run failed, 2 wrong input."""
    return groups.guarded("xpe.py", lambda: start(parse(argv)))


def start(cfg):
    """Do what a config asks for.  Raises MemoryError for each of torch's ways to say so."""
    job = transfer if cfg.target else run
    if cfg.load:
        job = use_adapter
    if cfg.benchmark:
        job = benchmark
    try:
        job(cfg)
    except RuntimeError as error:                  # torch has no type of its own for a CPU's memory
        if "memory" not in str(error):
            raise
        raise MemoryError(f"{describe(error)}; a smaller --batch-size needs less") from error


if __name__ == "__main__":
    sys.exit(main())
