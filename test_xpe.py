"""The tests, offline and on the CPU: each compares with what others wrote, or with constants.

Optimizer and schedule are compared step by step with transformers'; a prompt of length 0 with
transformers' plain classifier; adapters with PEFT, and with the released layout computed by hand;
logits with the same text alone, computed by hand; the prompt's order and counts, rates and error
lines with constants that can be checked by eye; a cached prompt with the encoded one; two models in
two threads with each alone; what is fast with what is plain; a run with itself repeated, from
Python, and killed and gone on with, to the last bit; operations with torch's own counts; groups.py
with the paper's numbers.
"""
import ast
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import gzip
import io
import itertools
import json
import math
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

# Before anything reads them.  One thread: in models as tiny as these, two would mostly wait.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import groups
import xpe

parametrize = pytest.mark.parametrize
HERE = Path(__file__).parent
METHODS = ("spt", "dual", "xpe")
SHORT = "--toy --source eng_Latn --languages eng_Latn,fra_Latn,nqo_Nkoo --steps"
TEXTS = ["topic1 topic2 filler3", "topic11", "filler1 topic21 topic22 foreign3 filler9 topic25"]
WORDS = {
    "a": "topic1 topic2 topic3",
    "b": "topic11 topic12 topic13",
    "c": "topic21 topic22 topic23",
}
SPLITS = ("train", "dev", "test")
HEAD = "base_model.classifier."
LOW, UNSEEN, SEEN, ALL = groups.TARGET_GROUPS


# ---------------------------------------------------------------------------------------- Helpers

@pytest.fixture(scope="session", autouse=True)
def signals_that_count():
    """Tests started with nohup or behind & ignore these, and so would all that they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The current folder of each test: what its commands name is in there, and so are its runs."""
    monkeypatch.chdir(tmp_path)


def call(*parts, main=xpe.main):
    """Exit code of a command: texts are split into words, paths and numbers are one word."""
    argv = []
    for part in parts:
        argv += part.split() if isinstance(part, str) else [str(part)]
    return main(argv)


def launch(*argv, out="runs"):
    """A run from the command line; -> its folder, the first in `out`."""
    assert call(*argv, "--out", Path(out)) == 0
    return next(Path(out).iterdir())


@pytest.fixture
def printed(capsys):
    """printed(*argv): what a command prints."""
    def printed(*argv):
        capsys.readouterr()
        assert call(*argv) == 0
        return capsys.readouterr().out
    return printed


@pytest.fixture
def refused(capsys):
    """refused(words, *argv): the command ends with exit code 2 and one line on standard error.

    The line holds all `words`: a list, or a text with | between them.  -> the line.
    """
    def refused(words, *argv, main=xpe.main):
        capsys.readouterr()
        assert call(*argv, main=main) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        for word in words.split(" | ") if isinstance(words, str) else words:
            assert word in error
        return error
    return refused


def lines_of(table):
    """The rows of a table, and of each row the cells between |."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def unescaped(text):
    r"""Bytes of a text in a table, in which \t, \n and \xff are what they are in Python."""
    return text.encode().decode("unicode_escape").encode("latin-1")


def encoder(name="toy"):
    return xpe.load_backbone(name)[0]


def tokenizer():
    return xpe.load_backbone("toy")[1]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A local --backbone: a tiny XLM-R with a head for 7 labels, saved by transformers."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone = encoder()
    backbone.config.num_labels = 7
    model = transformers.XLMRobertaForSequenceClassification(backbone.config)
    model.roberta.load_state_dict(backbone.state_dict())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """{method: folder of a finished run on the tiny backbone}; each group has a language."""
    codes = "fra_Latn,ita_Latn,pol_Latn,awa_Deva,fao_Latn,nqo_Nkoo,dzo_Tibt"
    argv = f"--toy --source enarzho --languages {codes} --steps 120 --lr 6e-3 --prompt-lr 0.1"
    return {method: launch(argv, "--backbone", tiny, "--method", method,
                           out=tmp_path_factory.mktemp(method)) for method in METHODS}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of 20 epochs."""
    return launch(SHORT, 100, out=tmp_path_factory.mktemp("whole"))


OF_THE_GRID = "SEEDS STEPS BACKBONE DATA OUT JOBS SLURM_ARRAY_TASK_ID SLURM_SUBMIT_DIR"


def spawn(*command, path="", **settings):
    """A process in a session of its own, its output piped; `python` is this one, or in `path`."""
    inner = {name: value for name, value in os.environ.items() if name not in OF_THE_GRID.split()}
    folders = [str(path), str(Path(sys.executable).parent), inner["PATH"]]
    inner |= dict(PATH=os.pathsep.join(filter(None, folders)), PYTHONUNBUFFERED="")
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=inner | settings, encoding="utf-8", stdin=pipe,
                            stdout=pipe, stderr=pipe, start_new_session=True)


def begin():
    """A process that makes the same run as `whole` in the current folder."""
    return spawn("python", HERE / "xpe.py", *SHORT.split(), "100")


def await_checkpoint(folder, process):
    """Wait for a run's first checkpoint, or for the end of its process."""
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)


def read_until(stream, pattern):
    """Read lines up to one that matches, which arrives while the process is at work."""
    assert any(re.match(pattern, line) for line in stream)


def ended(process):
    """(exit code, standard error) of a process, once it has ended."""
    _, error = process.communicate(timeout=600)
    return process.returncode, error


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def failing(error):
    """A function that raises an error, whatever it is called with."""
    def work(*_, **__):
        raise error
    return work


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def result(folder):
    return read_json(Path(folder, "result.json"))


def kept(folder):
    """What a checkpoint holds."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def outcome(folder):
    """What must be equal to the last bit in two runs alike: prompt and head, accuracies, curve."""
    adapter = (folder / "adapter/adapter_model.safetensors").read_bytes()
    found = result(folder)
    return adapter, found["accuracy"], found["dev_curve"]


def files(folder="."):
    """{path: (content, time of last change)} of everything below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def write_tsv(path, rows):
    """Rows (label, text) as SIB-200 has them: CSV with tabs, quoted where needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("category", "text"))
        writer.writerows(rows)


@pytest.fixture
def own(empty_folder):
    """A folder `own` with languages xx (labels a, b) and yy (b, c), unknown to groups.py."""
    for code, labels in (("xx", "ab"), ("yy", "bc")):
        rows = [(label, WORDS[label]) for label in labels * 4]
        for split in SPLITS:
            write_tsv(f"own/{code}/{split}.tsv", rows)


def model_of(method="dual", pool="first", labels=7, backbone=None):
    """A model with a random prompt of 6 vectors around the toy's backbone, in eval mode."""
    torch.manual_seed(0)
    prompt = xpe.build_prompt(method, 6, 64, 0.5)
    return xpe.PromptedClassifier(backbone or encoder(), prompt, labels, pool).eval()


def toy_sentences(*codes):
    """The toy's test sentences, tokenized."""
    examples = xpe.load_examples("toy", codes, "test")
    return xpe.tokenize(examples, groups.LABELS, tokenizer(), "cpu", 32)


def tokens(texts):
    """(ids (B, T), mask (B, T)) of right-padded texts."""
    encoded = tokenizer()(list(texts), padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def logits(model, *texts):
    """Logits (B, C) of ours, or of a model of transformers or PEFT."""
    ids, mask = tokens(texts or TEXTS)
    out = model(input_ids=ids, attention_mask=mask)
    return getattr(out, "logits", out)


def by_hand(backbone, prompt, head, texts=TEXTS, position=0):
    """Logits (B, C) of [prompt | text], one text at a time; `head`: {name: tensor}."""
    pooled = []
    for text in texts:
        ids, _ = tokens([text])
        words = backbone.get_input_embeddings()(ids[0])                                    # (T, H)
        inputs = dict(inputs_embeds=torch.cat([prompt, words])[None])               # (1, P + T, H)
        if len(prompt) == 0:
            inputs = dict(input_ids=ids)
        pooled.append(backbone(**inputs).last_hidden_state[0, position])
    hidden = torch.stack(pooled) @ head["dense.weight"].T + head["dense.bias"]             # (B, H)
    return torch.tanh(hidden) @ head["out_proj.weight"].T + head["out_proj.bias"]          # (B, C)


def expected_of(model, texts=TEXTS, position=0):
    return by_hand(model.backbone, model.prompt(), model.head.state_dict(), texts, position)


def close(a, b, tolerance):
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


# ------------------------------------------------------------------------- Optimizer and schedule

SHAPES = ((5, 3), (4,), (2, 3, 4), (1, 6))
PLAIN = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "beta1": None}


@parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@parametrize("scale", [1.0, 1e-15])                # of gradients: 1e-15 is where eps counts
@parametrize("decay", [0.0, 0.1])
def test_adafactor_is_transformers(decay, scale, dtype, tolerance):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = xpe.Adafactor(ours, lr=5e-3, weight_decay=decay)
    b = transformers.optimization.Adafactor(theirs, lr=5e-3, weight_decay=decay, **PLAIN)
    for step in range(50):
        if step == 25:                             # a new one goes on from the saved state
            saved = a.state_dict()
            a = xpe.Adafactor(ours, lr=123.0)
            a.load_state_dict(saved)
        size = scale * (10 if step % 9 == 8 else 1)            # ten times as large is clipped
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn_like(p) * size
        a.step()
        b.step()
        for p, q in zip(ours, theirs):
            assert close(p, q, tolerance), step


def test_adafactor_takes_a_closure():
    p = nn.Parameter(torch.zeros(3))

    def closure():
        loss = (p - 1).square().sum()
        loss.backward()
        return loss

    assert xpe.Adafactor([p], lr=0.1).step(closure).item() == 3
    assert p.tolist() == pytest.approx([0.1] * 3)


@parametrize("warmup, total, cycles", [
    (0, 30, 1),
    (3, 30, 2),
    (10, 97, 3),
    (2400, 24_000, 2),
])
def test_schedule_is_transformers(warmup, total, cycles):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    make = transformers.get_cosine_with_hard_restarts_schedule_with_warmup
    theirs = make(optimizer, warmup, total, cycles).lr_lambdas[0]
    for step in range(total + 3):
        ours = xpe.cosine_with_restarts(step, warmup, total, cycles)
        assert abs(ours - theirs(step)) <= 1e-12, step


# ------------------------------------------------------------------------------------ The prompts

@parametrize("ratio, encoded", [
    (0.3, 6),
    (0.48, 9),
    (0.7, 14),
    (0.01, 1),
    (0.99, 19),
])
def test_ratio_gives_the_number_of_encoded_vectors(ratio, encoded):
    prompt = xpe.build_prompt("dual", 20, 8, ratio)
    assert prompt.encoded().shape == (encoded, 8)
    assert prompt().shape == (20, 8)


def test_a_slip_is_no_soft_prompt():
    pytest.raises(KeyError, xpe.build_prompt, "xep", 20, 8)


def test_standard_part_first_encoded_part_second():
    prompt = xpe.build_prompt("dual", 4, 3, ratio=0.5)
    for p in prompt.parameters():
        p.data.zero_()
    prompt.standard.vectors.data += 1
    prompt.encoded.mlp[-1].bias.data += 2          # the last Linear gives 0 x + 2
    assert prompt().tolist() == [[1] * 3, [1] * 3, [2] * 3, [2] * 3]


@parametrize("method", METHODS)
def test_each_example_has_a_dropout_mask_of_its_own(method):
    torch.manual_seed(0)
    prompt = xpe.build_prompt(method, 6, 8, 0.5)
    batch = prompt.train()(5)
    assert batch.shape == (5, 6, 8)
    same = [torch.equal(a, b) for a, b in itertools.combinations(batch, 2)]
    assert same == [method == "spt"] * 10
    finished = prompt.eval()(5)
    assert torch.equal(finished, prompt().expand(5, 6, 8))


LARGE = transformers.XLMRobertaConfig(
    vocab_size=250002,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    max_position_embeddings=514,
    type_vocab_size=1,
)


def size_of(tensors):
    return sum(tensor.numel() for tensor in tensors)


@parametrize("method, count", [
    ("spt", 1_077_255),
    ("dual", 1_668_615),
    ("xpe", 1_668_615),
])
def test_parameter_counts_for_xlm_r_large(method, count):
    with torch.device("meta"):
        backbone = transformers.XLMRobertaModel(LARGE, add_pooling_layer=False)
        backbone.requires_grad_(False)
        model = xpe.PromptedClassifier(backbone, xpe.build_prompt(method, 20, 1024, 0.7), 7)
    plain = size_of(backbone.parameters()) + size_of(model.head.parameters())
    assert size_of(xpe.trainable(model).values()) == count
    assert round(plain / 1e6, 1) == 559.9


# --------------------------------------------------------------------------------- The classifier

def plain_classifier(tiny):
    """transformers' own, with seven classes."""
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(tiny, num_labels=7).eval()


def test_prompt_of_length_0_is_the_plain_classifier(tiny):
    plain = plain_classifier(tiny)
    model = xpe.PromptedClassifier(encoder(tiny), xpe.SoftPrompt(0, 64), 7).eval()
    model.head.load_state_dict(plain.classifier.state_dict())
    assert close(logits(model), logits(plain), 1e-6)


@parametrize("method", METHODS)
def test_cached_prompt_gives_the_same_and_needs_no_encoder(method):
    model = model_of(method)
    before = logits(model)
    assert torch.equal(before, logits(model.train().cache_prompt()))
    assert [p.shape for p in model.prompt.parameters()] == [(6, 64)]


def test_two_models_share_a_backbone_in_two_threads():
    backbone = encoder()
    models = [model_of(pool=pool, backbone=backbone) for pool in ("first", "bos")]
    sentences = toy_sentences("eng_Latn")

    def both(model):
        return torch.cat([logits(model), xpe.predict(model, sentences)]).detach()

    alone = [both(model) for model in models]
    assert not close(*alone, 1e-3)
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(both, models * 100)
    for one, expected in zip(found, alone * 100):
        assert close(one, expected, 1e-6)


@parametrize("pool", xpe.POOLS)
def test_fast_changes_no_result_and_no_gradient(pool):
    model = model_of(pool=pool)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def results(context):
        with context:
            found = logits(model)
        loss = xpe.loss_of(found, torch.arange(3))
        return found, *torch.autograd.grad(loss, parameters)

    plain = results(contextlib.nullcontext())
    for a, b in zip(results(xpe.fast(model)), plain, strict=True):
        assert close(a, b, 1e-6)


# ------------------------------------------------------------------------------- Loss and training

def test_best_epoch_is_kept_the_earlier_of_equals():
    model = model_of("spt")
    progress = xpe.Progress()
    best = []
    for epoch, accuracy in enumerate((50, 75, 75, 50, 100, 100)):
        model.prompt.vectors.data.fill_(epoch)
        progress.record({"dev_accuracy": accuracy}, model)
        best.append(progress.best["prompt.vectors"][0, 0].item())
    assert best == [0, 1, 1, 1, 4, 4]


@parametrize("losses, stop", [
    ([20 - n for n in range(20)] + [5] * 200, 98),     # overfits: the worse half counts alone
    ([1] * 200, 98),
    ([1] * 90 + [0.5] * 100, 111),                     # an equal loss is no better one
])
def test_early_stopping_begins_afresh_at_half_time(losses, stop):
    """24,000 steps in epochs of 154, patience 20; what transformers' callback, kept silent before
    step 12,000, does with these losses was computed with the authors' program."""
    progress = xpe.Progress()
    for epoch, loss in enumerate(losses, 1):
        progress.step = 154 * epoch
        progress.curve.append({"step": progress.step, "dev_loss": loss})
        if progress.finished(xpe.Config()):
            break
    assert epoch == stop


@pytest.fixture
def trained(monkeypatch):
    """[(model, what it was before, sentences, dev)] of every training."""
    seen = []
    train = xpe.train

    def spy(model, sentences, dev, *rest):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen.append((model, before, sentences, dev))
        return train(model, sentences, dev, *rest)

    monkeypatch.setattr(xpe, "train", spy)
    return seen


@parametrize("method, moved", [("dual", False), ("full", True)])
def test_backbone_moves_in_full_fine_tuning_alone(method, moved, trained):
    launch(SHORT, "30 --lr 1e-3 --method", method)
    model, before, _, _ = trained[0]
    for name, p in model.backbone.named_parameters(prefix="backbone"):
        assert torch.equal(p, before[name]) != moved, name
        assert p.grad is None
    assert not torch.equal(model.head.dense.weight, before["head.dense.weight"])


PAPER = {  # ending of the name: rate, decay
    "vectors": (5e-3, 0.0),
    "pseudo_prompt": (5e-5, 0.1),
    "weight": (5e-5, 0.1),
    "bias": (5e-5, 0.1),
}
RELEASED = {
    "vectors": (5e-3, 0.0),
    "pseudo_prompt": (5e-3, 0.0),
    "weight": (5e-5, 0.01),
    "bias": (5e-5, 0.0),
}


@parametrize("recipe, method, table", [
    ("paper", "spt", PAPER),
    ("paper", "dual", PAPER),
    ("paper", "xpe", PAPER),
    ("released", "spt", RELEASED),
    ("released", "dual", RELEASED | {"vectors": (5e-5, 0.01)}),
    ("released", "xpe", RELEASED),
])
def test_rate_and_decay_of_each_parameter(recipe, method, table):
    model = model_of(method)
    found = {}
    for group in xpe.parameter_groups(model, xpe.Config(method=method, recipe=recipe)):
        for p in group["params"]:
            found[p] = group["lr"], group["weight_decay"]
    wanted = {p: table[name.split(".")[-1]] for name, p in model.named_parameters()
              if "backbone" not in name}
    assert found == wanted


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_dropout_is_dropout(dtype):
    x = torch.full((1001, 301), 3.0, dtype=dtype, requires_grad=True)      # 1 more than 4 x 75,325
    with xpe.fast(model_of()):
        y = nn.Dropout(0.2)(x)
        assert nn.Dropout(0.2).eval()(x) is x
        assert F.dropout(x, p=0.0) is x
    y.sum().backward()
    kept = y != 0
    assert set(y.unique().tolist()) == {0.0, (x[0, 0] / 0.8).item()}
    assert torch.equal(x.grad, kept.to(dtype) * 1.25)

    lanes = kept.flatten()[:-1].view(-1, 4).double()                                   # (75325, 4)
    correlation = torch.corrcoef(lanes.T) - torch.eye(4)
    assert (lanes.mean(0) - 0.8).abs().max() < 0.006           # their deviation is 0.0015
    assert correlation.abs().max() < 0.015                     # and here 0.0036


@parametrize("dropout, expected", [("on", {0.0, 0.1}), ("off", {0.0})])
def test_backbones_dropout_is_fast_and_can_be_off(dropout, expected, monkeypatch):
    rates = set()
    draw = xpe.fast_dropout

    def spy(x, p=0.5, training=True, inplace=False):
        rates.add(p * training)
        return draw(x, p, training)

    monkeypatch.setattr(xpe, "fast_dropout", spy)
    launch(SHORT, 1, "--method spt --head-dropout 0 --backbone-dropout", dropout)
    assert rates == expected


AUTO = """
               | GPU | cuda:0 bf16
               |     | cpu fp32
--device cpu   | GPU | cpu fp32
--dtype fp32   | GPU | cuda:0 fp32
--method full  | GPU | cuda:0 fp32
               | T4  | cuda:0 fp32
"""


@parametrize("argv, there, expected", lines_of(AUTO))
def test_auto_is_a_gpu_in_bf16_where_there_is_one(argv, there, expected, monkeypatch):
    def zeros(size, device):                       # as on a machine with a GPU
        return SimpleNamespace(device={"cuda": "cuda:0"}.get(device, device), item=float)

    capability = (7, 5) if there == "T4" else (9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(there))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "zeros", zeros)
    cfg = xpe.parse(argv.split())
    assert f"{cfg.device} {cfg.dtype}" == expected


def test_epoch_batches_cover_every_sentence_once():
    lengths = np.random.default_rng(0).integers(5, 60, size=1001)
    batches = [xpe.epoch_batches(lengths, 32, 0, epoch) for epoch in (0, 0, 1)]
    first, again, second = [np.concatenate(indices).tolist() for indices in batches]
    assert first == again != second
    assert sorted(first) == sorted(second) == list(range(1001))
    assert sorted(map(len, batches[0])) == [9] + [32] * 31
    spread = [np.ptp(lengths[indices]) for indices in batches[0]]
    assert fmean(spread) < 20                      # of 54; unsorted: 51


def test_predictions_keep_the_order_and_equal_one_by_one(monkeypatch):
    small = functools.partial(xpe.evaluation_batches, positions=200)
    monkeypatch.setattr(xpe, "evaluation_batches", small)
    model = model_of()
    codes = ["eng_Latn", "nqo_Nkoo"]
    texts = [example.text for example in xpe.load_examples("toy", codes, "test")]
    sentences = toy_sentences(*codes)
    expected = expected_of(model, texts)
    assert close(xpe.predict(model.train(), sentences), expected, 1e-6)

    accuracy, loss, predicted = xpe.evaluate(model, sentences)
    classes = expected.argmax(1)
    right = (classes == sentences.classes).double()
    shares = 100 * right.view(2, 35).mean(dim=1)
    assert list(predicted) == classes.tolist()
    assert accuracy == pytest.approx(dict(zip(codes, shares.tolist())))
    assert loss == pytest.approx(xpe.loss_of(expected, sentences.classes).item(), abs=1e-5)


RESULT = "config digests labels versions seconds trainable_parameters dev_accuracy groups".split()


@parametrize("method", METHODS)
def test_toy_learns_and_its_result_is_whole(runs, method):
    found = result(runs[method])
    curve = found["dev_curve"]
    means = found["groups"]
    assert means[SEEN] >= 80
    assert means[SEEN] > means[UNSEEN] > means[LOW]
    assert set(RESULT) < found.keys()
    assert found["dev_accuracy"] == max(epoch["dev_accuracy"] for epoch in curve)
    assert curve[-1]["step"] == 120
    for epoch in curve:                            # the last step's, with warm-up in the first 12
        factor = xpe.cosine_with_restarts(epoch["step"] - 1, 12, 120)
        assert epoch["lr"] == pytest.approx(6e-3 * factor)


@parametrize("method", METHODS)
def test_predictions_give_the_accuracy(runs, method):
    found = result(runs[method])
    path = runs[method] / "predictions.csv"
    examples = xpe.load_examples("toy", found["config"]["languages"].split(","), "test")
    wanted = [f"{example.code},{example.row},{example.label}" for example in examples]
    assert [line.rpartition(",")[0] for line in path.read_text().splitlines()[1:]] == wanted
    shares = {code: 100 * fmean(right) for code, right in groups.read_answers(path).items()}
    assert found["accuracy"] == pytest.approx(shares)


# ---------------------------------------------------------------- Repeated, stopped, gone on with

@parametrize("steps", [0, 15])                     # 0: the seed decides the start, too
def test_one_seed_twice_is_bit_identical(steps):
    first, again, other = [outcome(launch(SHORT, steps, "--seed", seed, out=out))
                           for out, seed in (("a", 3), ("b", 3), ("c", 4))]
    assert first == again
    assert first[0] != other[0]


def test_python_gives_what_the_command_line_gives():
    folder = launch("--method spt", SHORT, 10)
    codes = "eng_Latn,fra_Latn,nqo_Nkoo"
    cfg = xpe.Config(method="spt", toy=True, source="eng_Latn", languages=codes, steps=10,
                     out="other")
    found = xpe.run(cfg)
    assert found["config"] == result(folder)["config"]
    assert outcome(Path("other", folder.name)) == outcome(folder)


@parametrize("number, code, lines", [
    (signal.SIGKILL, -9, 0),
    (signal.SIGTERM, 143, 1),
    (signal.SIGINT, 130, 1),
])
def test_interrupted_run_ends_as_if_it_never_was(number, code, lines, whole):
    folder = Path("runs", whole.name)
    process = begin()
    await_checkpoint(folder, process)
    process.send_signal(number)
    _, error = process.communicate()
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / "result.json").exists()
    assert outcome(launch(SHORT, 100)) == outcome(whole)
    assert process.returncode == code
    assert error.count("\n") == lines


def test_finished_run_is_reported_not_repeated(whole, printed):
    before = files(whole)
    out = printed(SHORT, "100 --out", whole.parent)
    assert "fra_Latn" in out
    assert files(whole) == before


def test_finished_is_told_without_the_encoder(monkeypatch):
    source = f"{SHORT} 0".split()
    target = [*source, *"--target-steps 0 --target kab_Latn".split()]
    assert xpe.main(source) == 0
    assert xpe.finished(xpe.parse(source))
    assert not xpe.finished(xpe.parse(target))
    assert xpe.main(target) == 0
    monkeypatch.delattr(xpe, "build_model")
    assert xpe.finished(xpe.parse(target))
    assert not xpe.finished(xpe.parse([*target, "--target", "kab_Latn,swh_Latn"]))
    for other in ("--clip 2", "--steps 1", "--dropout 0.3"):   # the last two: of the source run
        assert not xpe.finished(xpe.parse([*target, *other.split()]))      # they would be refused


def test_folder_of_another_config_is_refused(whole, refused):
    before = files(whole)
    other = SHORT, "99 --batch-size 7 --out", whole.parent
    error = refused("100 there, 99 here", *other)
    assert re.findall(r"(\w+) \(", error) == ["steps", "batch_size"]
    assert files(whole) == before


def test_a_second_process_is_told_and_the_first_goes_on(whole, refused):
    process = begin()
    folder = Path("runs", whole.name)
    await_checkpoint(folder, process)
    process.send_signal(signal.SIGSTOP)            # so that it cannot end before the second comes
    before = files()
    refused("another process", SHORT, 100)
    assert files() == before
    process.send_signal(signal.SIGCONT)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert outcome(folder) == outcome(whole)


@parametrize("split", SPLITS)
@parametrize("end", ["finished", "interrupted"])
def test_changed_data_are_refused(end, split, own, refused):
    argv = "--toy --source xx --languages xx --steps 4 --data own"
    folder = launch(argv)
    if end == "interrupted":
        (folder / "result.json").unlink()
    before = files(folder)
    write_tsv(f"own/xx/{split}.tsv", [("b", WORDS["b"]), ("a", WORDS["a"])])
    refused([folder.name, f"{'test' if split == 'test' else 'training'} sentences ("], argv)
    assert files(folder) == before


def test_another_encoder_of_the_same_shape_is_refused(tiny, refused):
    shutil.copytree(tiny, "encoder")
    argv = SHORT, "5 --backbone encoder"
    folder = launch(*argv)
    weights(keep="layer.0.output.LayerNorm.bias", add=1, others=True)(Path("encoder"))
    before = files(folder)
    refused("encoder (", *argv)
    assert files(folder) == before


def test_encoder_of_the_hub_is_known_by_its_name():
    digests = {xpe.digest_of(name) for name in ("a/one", "a/two", "a/one", "toy")}
    assert len(digests) == 3


def test_start_that_changed_is_another_start(tiny, refused):
    begun = launch(SHORT, 1, out="begun")
    argv = SHORT, "1 --init-from", begun
    launch(*argv)
    refused("another encoder", *argv, "--out other --backbone", tiny)
    edit("result.json", seconds=5.0)(begun)        # the same, made once more
    (begun / "predictions.csv").unlink()           # packed, say
    (begun / "notes.txt").write_text("mine")
    launch(*argv)
    edit("result.json", as_start="another")(begun)
    refused("start (", *argv)


def test_start_is_named_from_where_the_link_of_out_leads():
    for folder in ("far/away/runs", "first/run"):
        Path(folder).mkdir(parents=True)
    Path("runs").symlink_to("far/away/runs")
    cfg = xpe.Config(toy=True, init_from="first/run", out="runs")
    assert Path("runs", xpe.definition(cfg)["init_from"]).samefile("first/run")


def test_finished_run_is_reported_from_a_folder_that_nobody_can_write_to(monkeypatch, refused):
    launch(SHORT, 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    launch(SHORT, 1)
    refused("runs is no folder that can be written to", SHORT, 2, "--seed 1 --out runs")


@parametrize("name", ["replace", "fsync"])
def test_full_disk_is_one_line_and_keeps_the_checkpoint(name, whole, monkeypatch, capsys):
    real = getattr(os, name)
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 2:                         # the first epoch's log.csv and checkpoint.pt
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, name, full)
        assert call(SHORT, 100) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left" in error
    assert list(Path().rglob("*.new")) == []
    assert kept(Path("runs", whole.name))["progress"]["step"] == 5
    assert outcome(launch(SHORT, 100)) == outcome(whole)


def test_log_is_whole_again(whole, monkeypatch):
    """A kill came between an epoch's log and its checkpoint: the log is never behind it."""
    written = []
    write = xpe.write_file

    def killed(path, content):
        written.append(path.name)
        if len(written) == 2 * 7:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(xpe, "write_file", killed)
        launch(SHORT, 100)
    assert written == 7 * ["log.csv", "checkpoint.pt"]
    log = Path("runs", whole.name, "log.csv")
    assert len(log.read_text().splitlines()) == 1 + 7          # one more than the checkpoint knows
    launch(SHORT, 100)
    assert log.read_text() == (whole / "log.csv").read_text()


class Hostile:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return open, ("executed", "w")


SPT = '"method": "spt", "source": "x", "target": "", "seed": 0, "xpe_ratio": 0'


ROW = [{"step": 5, "dev_accuracy": 1.0}]
ODD_FILES = [  # a text is a result.json, a dict what is other than in a whole checkpoint.pt
    "{", f'{{"config": {{{SPT}}}, "accuracy": {{"x": 5}}}}',           # a result without digests
    5, {"config": 5}, {"digests": []}, {"model": {"a": torch.zeros(1)}}, {"model": {}},
    {"progress": {"step": 5, "seconds": 1.0, "curve": ROW, "best": {}}},   # it could not end
    {"progress": 5}, {"progress": {"a": 1}}, {"optimizer": {"state": 5}}, {"rng": torch.zeros(3)},
    {"progress": {"step": 5, "seconds": 1.0, "curve": 5, "best": {}}}, {"cuda_rng": 5}, Hostile(),
]


@parametrize("odd", ODD_FILES, ids=str)
def test_odd_file_in_its_folder_is_refused(odd, whole, refused):
    path = Path("runs", whole.name, "result.json" if isinstance(odd, str) else "checkpoint.pt")
    path.parent.mkdir(parents=True)
    if isinstance(odd, str):
        path.write_text(odd)
    else:
        torch.save(kept(whole) | odd if isinstance(odd, dict) else odd, path)
    before = files()
    refused([str(path.parent)], SHORT, 100)
    assert files() == before


def test_non_finite_loss_names_step_and_languages(own, monkeypatch, capsys):
    real = F.cross_entropy
    sizes = {1}

    def poisoned(output, classes, **_):            # from epoch 2 on, for label a: that is xx alone
        sizes.add(len(classes))                    # that of dev ends epoch 1
        bad = len(sizes) > 1 and classes.tolist() == [0]
        return real(output, classes) * (math.nan if bad else 1.0)

    argv = "--toy --source xx,yy --batch-size 1 --steps 40 --data own"     # an epoch is 16
    with monkeypatch.context() as patched:
        patched.setattr(F, "cross_entropy", poisoned)
        assert call(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert 17 <= int(re.search(r"step (\d+)", error)[1]) <= 32
    assert re.findall(r"\b(xx|yy)\b", error) == ["xx"]
    assert kept(Path("runs/toy-dual70-xx+yy-s0"))["progress"]["step"] == 16
    assert result(launch(argv))["dev_curve"][-1]["step"] == 40


def test_logits_that_are_not_finite_are_no_result(capsys):
    path = toy_adapter() / "adapter_model.safetensors"
    save_file({name: 1e30 * tensor for name, tensor in load_file(path).items()}, path)
    Path("lines").write_text("topic1")
    for what, place in (("--languages eng_Latn", "test: 1 language"), ("--predict lines", "lines")):
        assert call("--toy --load adapter", what) == 1
        assert f"{place}: a logit is " in capsys.readouterr().err


def test_non_finite_dev_loss_keeps_the_checkpoint(capsys):
    rates = "--lr 1e12 --weight-decay 1e12 --warmup 0"         # one step breaks the weights
    assert call(SHORT, 4, "--batch-size 1000", rates) == 1
    assert "dev: 1 language: a logit is nan" in capsys.readouterr().err
    assert list(Path("runs").glob("*/checkpoint.pt")) == []


# ------------------------------------------------------------------ Sequential transfer, baseline

FROM_ENGLISH = "--toy --source eng_Latn"
LAO_KABYLE = "--target lao_Laoo,kab_Latn --target-steps 0"


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    """A folder with a: a source run and two targets, b: the targets from that source run."""
    folder = tmp_path_factory.mktemp("transferred")
    argv = SHORT, 60, LAO_KABYLE, "--languages lao_Laoo,kab_Latn --out"
    assert call(*argv, folder / "a") == 0
    source = folder / "a/toy-dual70-eng_Latn-s0"
    assert call(FROM_ENGLISH, LAO_KABYLE, "--out", folder / "b", "--init-from", source) == 0
    return folder


@parametrize("out, count", [("a", 3), ("b", 2)])   # b: no second source run
def test_target_starts_where_the_source_run_ended(out, count, transferred):
    assert len(list((transferred / out).iterdir())) == count
    accuracy = result(transferred / "a/toy-dual70-eng_Latn-s0")["accuracy"]
    for code in ("lao_Laoo", "kab_Latn"):
        target = result(transferred / out / f"toy-dual70-eng_Latn-{code}-s0")
        settings = {"steps": 0, "warmup": 0.05, "dropout": 0.0, "patience": 30, "target": code}
        assert target["accuracy"] == {code: accuracy[code]}
        assert settings.items() <= target["config"].items()


def test_runs_are_the_same_by_other_paths_and_when_moved(transferred, monkeypatch):
    before = files(transferred)
    monkeypatch.chdir(transferred)
    start = "--init-from a/toy-dual70-eng_Latn-s0/"
    assert call(FROM_ENGLISH, LAO_KABYLE, "--out ./b/", start) == 0
    Path("a").rename("moved")
    assert call(SHORT, 60, LAO_KABYLE, "--languages lao_Laoo,kab_Latn --out moved") == 0
    Path("moved").rename("a")
    assert files(transferred) == before


def test_target_keeps_the_labels_of_its_source(own, refused):
    argv = "--toy --source xx --target yy --steps 20 --target-steps 0 --data own"
    refused("yy/train.tsv:3 | 'c'", argv, "--languages xx")        # its rows are b, c, ...
    for split in SPLITS:
        write_tsv(f"own/yy/{split}.tsv", [("b", WORDS["b"])] * 4)          # no a
    assert call(argv, "--languages xx,yy") == 0
    accuracy = result("runs/toy-dual70-xx-s0")["accuracy"]
    assert result("runs/toy-dual70-xx-yy-s0")["accuracy"] == {"yy": accuracy["yy"]}


@parametrize("start, languages", [("", "all"), ("a", "all"), ("a", "kab_Latn")])
def test_run_on_a_target_is_refused_but_from_transfer(start, languages):
    """Else it would train with the source's steps, and count as a transfer."""
    cfg = xpe.Config(toy=True, source="eng_Latn", target="kab_Latn", init_from=start,
                     languages=languages)
    with pytest.raises(xpe.InputError, match="transfer"):
        xpe.run(cfg)


def test_adapter_starts_no_transfer_with_other_languages_or_pool(refused):
    adapter = launch("--method spt", SHORT, 0, out="begun") / "adapter"
    argv = "--toy --method spt --target-steps 0 --target kab_Latn --init-from", adapter
    refused("trained with --source eng_Latn", *argv)
    refused("--pool first", *argv, "--source eng_Latn --pool bos")
    assert call(*argv, "--source eng_Latn") == 0


def test_adapter_without_languages_counts_as_from_the_source(capsys):
    adapter = launch("--method spt", SHORT, 0, out="begun") / "adapter"
    (adapter / "xpe.json").unlink()                # as PEFT leaves one
    argv = "--toy --method spt --target-steps 0 --target kab_Latn --init-from", adapter
    assert call(*argv, "--labels", ",".join(groups.LABELS)) == 0
    assert "does not say what it was trained on" in capsys.readouterr().err


def test_run_on_a_target_starts_no_transfer_from_its_source(refused):
    argv = "--toy --source eng_Latn --target-steps 0"
    assert call(argv, "--steps 1 --target kab_Latn") == 0
    kabyle = "runs/toy-dual70-eng_Latn-kab_Latn-s0"
    refused("with --source kab_Latn", argv, "--target swh_Latn --init-from", kabyle)


def test_start_that_does_not_fit_is_refused(refused):
    dual = launch(SHORT, 1, out="dual")
    short = launch(SHORT, 0, "--method spt --prompt-length 1", out="short")
    argv = "--toy --target kab_Latn --init-from", dual
    refused("--init-from | --source eng_Latn", *argv)
    refused("--init-from | --pool first", *argv, "--source eng_Latn --pool bos")
    refused("leave --labels out", *argv, "--source eng_Latn --labels a,b")
    for folder in (dual, HERE, short):             # short would be broadcast
        refused(f"{folder}: does not fit", "--method spt", SHORT, "0 --init-from", folder)
    refused("adapter: does not fit", "--method xpe", SHORT, "0 --init-from", dual / "adapter")
    other = launch(SHORT, 2, out="other")
    shutil.copy(other / "checkpoint.pt", dual)
    refused("checkpoint.pt is of another training", *argv, "--source eng_Latn")
    (dual / "result.json").unlink()
    refused("--init-from | must be finished", *argv, "--source eng_Latn")
    assert not Path("runs").exists()


def test_target_learns_from_its_own_sentences_alone(trained):
    codes = ["eng_Latn", "awa_Deva", "kab_Latn"]
    assert call(SHORT, 20, "--target awa_Deva,kab_Latn") == 0
    used = [[set(sentences.languages), set(dev.languages)] for _, _, sentences, dev in trained]
    assert used == [[{code}, {code}] for code in codes]
    curve = result("runs/toy-dual70-eng_Latn-kab_Latn-s0")["dev_curve"]
    assert curve[-1]["step"] == 75                 # the toy's --target-steps


def test_full_fine_tuning_leaves_no_prompt_and_no_checkpoint(trained):
    argv = "--method full", SHORT, 5
    folder = launch(*argv)
    model, _, _, _ = trained[0]
    assert len(model.prompt()) == 0
    assert result(folder)["trainable_parameters"] == size_of(model.parameters())
    (folder / "checkpoint.pt").write_bytes(b"4.5 GB")          # what a kill would leave
    launch(*argv)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["log.csv", "predictions.csv", "result.json"]


# --------------------------------------------------------------------------- One change, one place

def falls(folder):
    """Does the dev loss fall in a run?"""
    curve = result(folder)["dev_curve"]
    return curve[-1]["dev_loss"] < 0.9 * curve[0]["dev_loss"]


class OtherPrompt(nn.Embedding):
    """Another prompt method: the rows of an embedding."""

    def forward(self, *batch):
        return self.weight.expand(*batch, -1, -1)                                       # (B, P, H)


def test_another_prompt_is_one_change(monkeypatch, trained):
    monkeypatch.setattr(xpe, "build_prompt", lambda method, P, H, ratio, **_: OtherPrompt(P, H))
    monkeypatch.setitem(xpe.SHARES, "other", 0.0)
    folder = launch(SHORT, "60 --method other")
    best = kept(folder)["progress"]["best"]
    assert not torch.equal(best["prompt.weight"], trained[0][1]["prompt.weight"])
    assert falls(folder)
    assert groups.load_runs("runs")[0].label == "OTHER"


def test_another_pooling_is_one_change(monkeypatch):
    def mean(states, mask, P):
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)               # (B, H)

    monkeypatch.setitem(xpe.POOLS, "mean", mean)
    assert falls(launch(SHORT, 60, "--pool mean"))


def test_another_loss_is_one_change(monkeypatch):
    monkeypatch.setattr(xpe, "loss_of", lambda logits, classes: 0 * logits.sum() + 5)
    epoch = result(launch(SHORT, 5))["dev_curve"][0]
    assert (epoch["loss"], epoch["dev_loss"]) == (5, 5)


# --------------------------------------------------------------------------------------- Settings

def flag(name):
    return "--" + name.replace("_", "-")


def out_of_bounds():
    """(setting, value): outside the bounds of a number, no whole one, and none of the choices."""
    for field in dataclasses.fields(xpe.Config):
        facts = field.metadata
        if facts["choices"]:
            yield field.name, "none"
        elif field.type in (int, float):
            for value in (facts["least"] - 1, facts["below"], math.nan, str(facts["least"])):
                yield field.name, value
        if field.type is int:
            yield field.name, facts["least"] + 0.5


@parametrize("name, value", list(out_of_bounds()))
def test_a_value_out_of_bounds_is_refused(name, value):
    with pytest.raises(xpe.InputError, match=f"^{flag(name)} .*$"):
        xpe.Config(**{name: value})


SAID = """
--method spt --prompt-length 1
--method full --prompt-length 0 --dtype fp32 --xpe-ratio 0
--method xpe --xpe-ratio 1
--xpe-ratio 0.3 --prompt-length 2 --mlp-hidden 7 --dropout 0.25 --head-dropout 0 --pool bos
--backbone FacebookAI/xlm-roberta-large --data Davlan/sib200 --max-length 164
--source seen --languages kab_Latn --out there
--source seen --target full --init-from here
--steps 24000 --lr 5e-5 --prompt-lr 5e-3 --target-steps 6000 --target kab_Latn
--steps 0 --lr 0 --prompt-lr 0 --target-steps 0 --target kab_Latn
--clip 1e-3 --warmup 0 --weight-decay 0
--batch-size 3 --cycles 1 --patience 1 --seed 5 --recipe released --weight-decay 0.1
--target-warmup 0.5 --target-dropout 0.5 --target-patience 1 --target kab_Latn
--backbone-dropout off
--device cpu --dtype bf16 --load there --predict -
"""


@parametrize("toy", [[], ["--toy"]])
@parametrize("argv", SAID.strip().splitlines())
def test_nothing_that_was_said_is_changed(argv, toy):
    words = argv.split()
    cfg = xpe.parse([*words, *toy])
    fields = {flag(field.name): field for field in dataclasses.fields(xpe.Config)}
    for name, value in dict(zip(words[::2], words[1::2])).items():
        assert getattr(cfg, fields[name].name) == fields[name].type(value)


def test_numbers_of_other_types_are_numbers():
    cfg = xpe.Config(lr=np.float32(0.5), data=Path("here"))
    assert (type(cfg.lr), type(cfg.data)) == (float, str)


# -------------------------------------------------------------------------------------- Bad input

BAD_INPUT = """
--source eng_Lat                                | 'eng_Lat' | eng_Latn
--source joshi                                  | 'joshi' | joshi5
--source ,                                      | '' in --data toy; there are: ace_Arab
--source eng_Latn --languages fra_Latn,french   | 'french'
--method dul                                    | 'dul' | dual
--xpe-ratio 0                                   | --xpe-ratio
--xpe-ratio 1                                   | --xpe-ratio
--xpe-ratio 1.5                                 | --xpe-ratio
--method spt --xpe-ratio 0.5                    | --xpe-ratio | spt
--prompt-length 1                               | --prompt-length | 2
--prompt-length 100                             | 100 | 128 positions
--benchmark --prompt-length 110 --max-length 10 | 128 positions
--steps -1                                      | --steps -1
--steps many                                    | --steps | 'many'
--seed 9999999999999999999999                   | --seed
--lr nan                                        | --lr nan
--clip 0                                        | --clip 0
--batch-size 0                                  | --batch-size 0
--colour red                                    | --colour
--predict file                                  | --predict | --load
--labels a,b                                    | --labels names the classes of an adapter
--init-from=                                    | --init-from is empty
--load there --steps 5                          | --steps has no effect with --load
--load there --pool bos                         | --pool has no effect with --load
--target-steps 5                                | --target-steps has no effect without --target
--target kab_Latn --init-from a --steps 0       | --steps has no effect | --target-steps
--target kab_Latn --init-from a --languages all | --languages has no effect | --target-steps
--target swh_Lat                                | 'swh_Lat' | swh_Latn
--target swh_Latn --method full                 | --target | --method full
--target-steps -1                               | --target-steps -1
--device cuda:77                                | cuda:77
--device abacus                                 | abacus
--device meta                                   | --device meta
--backbone ./none                               | none | --backbone DIR | --toy
--backbone nobody/nothing                       | nobody/nothing | --backbone DIR | --toy
--data ./none                                   | none | no such folder
--data empty                                    | empty
--data nobody/nothing                           | nobody/nothing | --data DIR
--out file/below                                | file
--out dangling                                  | dangling
--load none                                     | none
--init-from none                                | none: no such folder
--method full --dtype bf16                      | --method full | bf16
--method full --prompt-length 5                 | --method full | --prompt-length
--method full --target kab_Latn                 | --method full | --target
--method full --xpe-ratio 0.5                   | --xpe-ratio | full
--method xpe --xpe-ratio 0.5                    | --xpe-ratio | xpe
"""


@parametrize("row", lines_of(BAD_INPUT))
def test_bad_input_is_one_line_and_leaves_nothing(row, refused):
    argv, *words = row
    Path("empty").mkdir()
    Path("file").touch()
    Path("dangling").symlink_to("gone")
    before = sorted(Path().rglob("*"))
    refused(words, "--toy", argv)
    assert sorted(Path().rglob("*")) == before


@parametrize("argv", ["--backbone toy", "--data toy", "--load adapter --languages kab_Latn"])
def test_toy_without_its_flag_is_refused(argv, refused):
    """Its numbers would pass for real ones."""
    edit("adapter_config.json", base_model_name_or_path="toy")(toy_adapter())
    refused("belongs to --toy", argv)


BAD_DATA = r"""
xx/dev.tsv   | category\ttext\na\tone\nd\ttwo\n  | xx/dev.tsv:3: unknown label 'd'; known: a, b
xx/dev.tsv   | category\ttext\na\t"one\n ""two""\x22\nd\ttwo\n | xx/dev.tsv:4: unknown label
xx/train.tsv | category\ttext\na\tone\n\ttwo\n   | xx/train.tsv:3: unknown label ''
yy/test.tsv  | category\ttext\nb\tone\nb\t \n    | yy/test.tsv:3: empty text
xx/train.tsv | category\ttext\na\tone\na\n       | xx/train.tsv:3: empty text
xx/train.tsv | category\ttext\n                  | no train rows for xx
xx/train.tsv | category\ttext\na\tone\ttwo\n     | xx/train.tsv:2: more columns than the header
xx/train.tsv | category\ttext\na\t"one\nb\ttwo"  | xx/train.tsv:3: more columns
xx/train.tsv | category\ttext\tnote\na\tone\t"so\nb\ttwo\ty"\n | xx/train.tsv:3: more columns
xx/train.tsv | category\ttext\ra\t"one\rb\ttwo"   | xx/train.tsv:3: more columns
xx/train.tsv | category\ttext\na\t"one" two\n    | xx/train.tsv, behind line 1
xx/train.tsv | category\ttext\na\tone\na\t"two\n | xx/train.tsv, behind line 2 | end of data
xx/train.tsv | category\ttext\na\tone\na\t\xe9\n | xx/train.tsv:3: not UTF-8
xx/train.tsv | \xff\xfec\0a\0t\0                 | xx/train.tsv:1: not UTF-8
xx/train.tsv | a,b\n1,2\n                        | xx/train.tsv:1: the columns are ['a,b']
xx/train.tsv | text\tcategory\ttext\n            | ['text', 'category', 'text']
xx/train.tsv | Category\ttext\n                  | one must be category, one text
xx/train.tsv | \n                                | the columns are []
xx/dev.tsv   |                                   | xx/dev.tsv: cannot be read (FileNotFoundError
yy/test.tsv  |                                   | yy/test.tsv: cannot be read
"""


@parametrize("row", lines_of(BAD_DATA))
def test_bad_data_names_file_and_line(row, own, refused):
    name, content, *words = row
    path = Path("own", name)
    path.write_bytes(unescaped(content))
    if not content:
        path.unlink()
    refused(words, "--toy --data own --source xx --steps 1")
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------- Data

# The rows of a file, and the text and the label of its last one.
GOOD_DATA = r"""
\xef\xbb\xbfcategory\ttext\na\tone\nb\ttwo      | two            | b
category\ttext\r\na\tone\r\nb\ttwo\r\n          | two            | b
category\ttext\ra\tone\rb\ttwo\r                | two            | b
category\ttext\t\na\tone\t\nb\ttwo\t\n          | two            | b
category\ttext\na\tone\nb\ttwo\n\n\n            | two            | b
category\ttext\na\tone\n b \ttwo                | two            | b
text\tid\tcategory\none\t0\ta\nt\0o\t2\t0       | t\0o           | 0
category\ttext\na\tone\na\the "said" it         | he "said" it   | a
category\ttext\na\tone\na\t"said ""a\tb""\x22\n | said "a\tb"    | a
category\ttext\na\tone\na\t"one\ntwo"\n         | one\ntwo       | a
category\ttext\na\tone\na\tto\xe2\x80\xa8 7     | to\u2028 7     | a
"""


@parametrize("row", lines_of(GOOD_DATA))
def test_file_is_read_right(row, own):
    content, text, label = row
    Path("own/xx/dev.tsv").write_bytes(unescaped(content))
    texts, labels = xpe.load_language("own", "xx", "dev")
    assert texts[0] == "one"
    assert (texts[-1], labels[-1]) == (text.encode().decode("unicode_escape"), label)


def test_an_eighth_label_beside_those_of_sib200_is_refused(refused):
    for split in SPLITS:
        write_tsv(f"data/xx/{split}.tsv", [(label, "topic1") for label in groups.LABELS])
    write_tsv("data/xx/train.tsv", [(label, "topic1") for label in (*groups.LABELS, "sport")])
    refused("data/xx/train.tsv:9: unknown label 'sport'", "--toy --data data --source xx")


def test_long_text_is_read_whole(own):
    write_tsv("own/xx/dev.tsv", [("a", "x" * 200_000)])
    assert xpe.load_language("own", "xx", "dev") == (["x" * 200_000], ["a"])


# What is done to a data folder in a shell, and what is said then.
ODD_FOLDERS = """
cp -r own/xx own/.ipynb_checkpoints                        |
mv own/xx elsewhere; ln -s ../elsewhere own/xx             |
mv own/xx/train.tsv own/xx/train.csv                       | train.csv is there: write it with tabs
for f in own/*/*.tsv; do mv $f ${f%tsv}csv; done           | train.csv is there: write train.tsv
rm own/xx/train.tsv; mkdir own/xx/train.tsv                | IsADirectoryError
"""


@parametrize("row", lines_of(ODD_FOLDERS))
def test_folder(row, own, refused):
    change, words = row
    subprocess.run(change, shell=True, check=True)
    if words:
        refused(words, "--toy --data own --source xx --steps 1")
    else:
        assert xpe.available_codes("own") == ["xx", "yy"]
        assert call("--toy --data own --source xx,yy --steps 1") == 0


HUB_LANGUAGE = """
- config_name: {code}
  sep: "\\t"
  data_files:
  - split: train
    path: data/{code}/train.tsv
  - split: validation
    path: data/{code}/dev.tsv
  - split: test
    path: data/{code}/test.tsv"""


def test_data_set_in_the_hubs_format(tmp_path, monkeypatch):
    """Two of the toy's languages as a data set of the hub, which says validation for dev."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    codes = ["eng_Latn", "fra_Latn"]
    configs = "".join(HUB_LANGUAGE.format(code=code) for code in codes)
    Path("hub").mkdir()
    Path("hub/README.md").write_text(f"---\nconfigs:{configs}\n---\n")
    expected = {}
    for code, split in itertools.product(codes, SPLITS):
        texts, labels = expected[code, split] = xpe.load_language("toy", code, split)
        write_tsv(f"hub/data/{code}/{split}.tsv", zip(labels, texts))
    assert xpe.available_codes("hub") == codes
    for cell, there in expected.items():
        assert xpe.load_language("hub", *cell) == there


TYPED = """---
configs:
- config_name: xx
  data_files:
  - {split: train, path: rows.jsonl}
"""
NAMED = """dataset_info:
- config_name: xx
  features:
  - {name: text, dtype: int64}
  - {name: category, dtype: {class_label: {names: [sun, rain]}}}
"""


def labels_of_data_set(folder, card, *categories):
    """The labels of a local folder for load_dataset with these categories."""
    Path(folder).mkdir(exist_ok=True)
    rows = [json.dumps(dict(text=7, category=category)) for category in categories]
    Path(folder, "rows.jsonl").write_text("\n".join(rows))
    Path(folder, "README.md").write_text(card + "---\n")
    texts, labels = xpe.load_language(folder, "xx", "train")
    assert set(texts) == {"7"}
    return labels


def test_typed_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert labels_of_data_set("a", TYPED, 1, 0) == ["1", "0"]
    assert labels_of_data_set("a", TYPED, 2, 3, 4) == ["2", "3", "4"]      # under the same path
    assert labels_of_data_set("b", TYPED + NAMED, 1, 0) == ["rain", "sun"]
    with pytest.raises(groups.InputError, match="Invalid integer class label -1"):
        labels_of_data_set("b", TYPED + NAMED, -1)


def test_hub_is_asked_once(refused, monkeypatch):
    def ask(url):
        raise ConnectionError(f"no network for {url}")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    words = "no network for https://huggingface.co/"
    refused(words + "models/xlmr", RUN, "--backbone models/xlmr")
    refused(words + "datasets/my/data", "--data my/data")


# --------------------------------------------------------------------------------------- Adapters

def adapter(tensors, **config):
    """A hand-made adapter in the folder `adapter`, without xpe.json."""
    Path("adapter").mkdir(exist_ok=True)
    save_file(tensors, "adapter/adapter_model.safetensors")
    config = {"num_virtual_tokens": 4, "peft_type": "XPE"} | config
    Path("adapter/adapter_config.json").write_text(json.dumps(config))


def toy_adapter(length=4):
    """Our own adapter for the toy's encoder, in the folder `adapter`; -> the folder."""
    model = xpe.PromptedClassifier(encoder(), xpe.SoftPrompt(length, 64), 7)
    xpe.save_adapter(model, "adapter", facts=dict(labels=list(groups.LABELS)))
    return Path("adapter")


def edit(name, **changes):
    """A change of a JSON file in a folder."""
    def change(folder):
        content = read_json(folder / name)
        (folder / name).write_text(json.dumps(content | changes))
    return change


def load(folder="adapter", name="toy"):
    return xpe.load_adapter(folder, encoder(name)).eval()


HEAD_SHAPES = {
    "dense.weight": (64, 64),
    "dense.bias": (64,),
    "out_proj.weight": (7, 64),
    "out_proj.bias": (7,),
}


def random_head(prefix=""):
    """{name: tensor} of a classification head (H = 64, C = 7)."""
    return {prefix + name: 0.1 * torch.randn(shape) for name, shape in HEAD_SHAPES.items()}


def named(head):
    """A head under an adapter's names."""
    return {HEAD + name: tensor for name, tensor in head.items()}


@parametrize("method", METHODS)
def test_peft_loads_our_adapter(runs, tiny, method):
    peft = pytest.importorskip("peft")
    folder = runs[method] / "adapter"
    theirs = logits(peft.PeftModel.from_pretrained(plain_classifier(tiny), str(folder)).eval())
    assert close(logits(load(folder, tiny)), theirs, 1e-5)
    assert theirs.std() > 1                        # a random head would give 0.1
    facts = read_json(folder / "xpe.json")
    assert facts["labels"] == list(groups.LABELS)
    assert sorted(facts["languages"]) == groups.ENARZHO


def test_we_load_pefts_adapter(tiny):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    theirs = peft.get_peft_model(plain_classifier(tiny), config).eval()
    theirs.save_pretrained("adapter")
    assert close(logits(load("adapter", tiny)), logits(theirs), 1e-5)


SAVED = json.loads("""{
    "peft_type": "PROMPT_TUNING",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "somewhere",
    "num_virtual_tokens": 6,
    "token_dim": 64,
    "num_transformer_submodules": 1,
    "num_attention_heads": 4,
    "num_layers": 2,
    "modules_to_save": ["classifier"],
    "prompt_tuning_init": "RANDOM",
    "inference_mode": true
}""")


def test_what_is_saved_is_what_is_loaded():
    model = model_of("xpe", labels=3).train()
    xpe.save_adapter(model, "adapter", base="somewhere", facts={"labels": ["x"]})
    assert model.prompt.mlp.training
    assert close(logits(load()), logits(model.eval()), 1e-6)
    tensors = load_file("adapter/adapter_model.safetensors")
    assert tensors.keys() == {"prompt_embeddings", *named(HEAD_SHAPES)}
    assert torch.equal(tensors["prompt_embeddings"], model.prompt())
    assert read_json("adapter/adapter_config.json") == SAVED
    assert read_json("adapter/xpe.json") == {"labels": ["x"]}


def test_adapter_can_be_read_by_others(runs):
    Path("any").touch()
    for path in (runs["dual"] / "adapter").iterdir():
        assert path.stat().st_mode == Path("any").stat().st_mode, path


@parametrize("base, note", [
    ("some/other", "adapter was made for some/other, and is used with {}\n"),
    ("{}", ""),
])
def test_adapter_of_a_backbone_of_another_name_is_noted(base, note, tiny, capsys):
    xpe.save_adapter(model_of(), "adapter", base=base.format(tiny))
    load("adapter", tiny)
    assert capsys.readouterr().err == note.format(tiny)


def test_pool_bos_is_no_adapter():
    with pytest.raises(ValueError, match="bos"):
        xpe.save_adapter(model_of(pool="bos"), "adapter")


def random_encoder(encoded):
    """{name: tensor} of a pseudo prompt and its MLP as released, and what they give (P, H)."""
    mlp = nn.Sequential(
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(16, 64),
    ).eval().requires_grad_(False)
    x = torch.randn(encoded, 64)
    tensors = {f"prompt_encoder.xpe_head.{name}": p for name, p in mlp.named_parameters()}
    return tensors | {"prompt_encoder.xpe_embedding.weight": x}, mlp(x)


@parametrize("method, standard, ratio", [
    ("spt", 4, None),
    ("dual", 1, 0.75),
    ("xpe", 0, None),
])
def test_released_layout_by_hand(method, standard, ratio):
    torch.manual_seed(1)
    prompt = torch.randn(standard, 64)
    head = random_head()
    tensors = named(head)
    if standard > 0:
        tensors["prompt_encoder.embedding.weight"] = prompt
    if standard < 4:
        more, finished = random_encoder(4 - standard)
        tensors |= more
        prompt = torch.cat([prompt, finished])
    adapter(tensors)
    model = load()
    assert close(model.prompt(), prompt, 1e-5)
    assert close(logits(model), by_hand(model.backbone, prompt, head), 1e-5)

    cfg = xpe.Config(method=method, xpe_ratio=ratio, prompt_length=4, mlp_hidden=16, toy=True,
                     init_from="adapter")
    started, _ = xpe.build_model(cfg, groups.LABELS)           # --init-from keeps the encoder
    started.eval()
    assert torch.equal(started.prompt(), model.prompt())
    order = [groups.SIB200_ORDER.index(label) for label in groups.LABELS]      # theirs differs
    assert close(logits(started), logits(model)[:, order], 1e-6)


SIB200_LABELS_TXT = "science/technology travel politics sports health entertainment geography"
AUTHORS_VECTORS, PEFTS_VECTORS = "prompt_encoder.embedding.weight", "prompt_embeddings"


@parametrize("vectors, said, expected", [
    (AUTHORS_VECTORS, "", SIB200_LABELS_TXT.split()),
    (AUTHORS_VECTORS, "g,f,e,d,c,b,a", list("gfedcba")),
    (PEFTS_VECTORS, "", sorted(SIB200_LABELS_TXT.split())),
    (PEFTS_VECTORS, "g,f,e,d,c,b,a", list("gfedcba")),
])
def test_order_of_the_classes(vectors, said, expected, capsys, refused):
    adapter({vectors: torch.randn(4, 64)} | random_head(HEAD))
    assert xpe.class_names(xpe.read_adapter("adapter"), said) == expected
    note = "" if said else f"are taken, from {expected[0]} to {expected[-1]}; --labels says others"
    assert note in capsys.readouterr().err
    refused("7 classes | 2 are named: a, b", "--toy --labels a,b --load adapter")
    toy_adapter()                                  # which has names
    refused("leave --labels out", "--toy --labels g,f,e,d,c,b,a --load adapter")


def test_classes_are_known_by_their_names(refused):
    """--init-from permutes what it takes over, or refuses other labels."""
    (toy_adapter(length=20) / "xpe.json").unlink()
    argv = "--method spt", SHORT, "0 --init-from adapter --labels"
    folder = launch(*argv, ",".join(groups.LABELS[::-1]))
    before, after = [load_file(one / "adapter_model.safetensors")[HEAD + "out_proj.weight"]
                     for one in (Path("adapter"), folder / "adapter")]
    assert torch.equal(after, before.flip(0))
    words = "its labels are a, b, c, d, e, f, g, not entertainment"
    refused(words, *argv, "a,b,c,d,e,f,g --out other")


def test_older_layouts():
    """A pure XPE's pseudo prompt called `embedding`, P_TUNING's finished prompt, and .bin files."""
    torch.manual_seed(1)
    head = random_head(HEAD)
    tensors, prompt = random_encoder(4)
    tensors[AUTHORS_VECTORS] = tensors.pop("prompt_encoder.xpe_embedding.weight")
    adapter(tensors | head)
    assert close(load().prompt(), prompt, 1e-6)

    finished = {PEFTS_VECTORS: prompt} | head
    adapter(finished, peft_type="P_TUNING")
    assert torch.equal(load().prompt(), prompt)
    Path("adapter/adapter_model.safetensors").unlink()
    torch.save(finished, "adapter/adapter_model.bin")
    assert torch.equal(load().prompt(), prompt)


@parametrize("value, words", [
    (torch.zeros(1).expand(10**6, 10**4), "prompt_embeddings is larger than its file"),
    (Hostile(), "not a readable adapter"),
])
def test_bin_file_that_would_harm_is_refused(value, words, refused):
    (toy_adapter() / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": value}, "adapter/adapter_model.bin")
    refused(words, "--toy --load adapter")
    assert not Path("executed").exists()


MICM = dict(peft_type="XPE", task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=256,
            encoder_num_layers=2, encoder_dropout=0.1, encoder_freeze=False, encoder_num_heads=4,
            encoder_embedding_freeze=False, encoder_embedding_init_type="hf_default")


def authors_adapter(tiny, ratio, kind="MLP"):
    """What the authors' library writes, in the folder `adapter`; -> its model."""
    micm = pytest.importorskip("micm_nlp.models.xpe", exc_type=ImportError)
    more = dict(encoder_ratio=ratio, encoder_reparameterization_type=kind)
    theirs = micm.get_xpe_model(plain_classifier(tiny), MICM | more)
    torch.manual_seed(0)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    theirs.eval().save_pretrained("adapter")
    return theirs


@parametrize("ratio", [0, 0.3, 0.7, 1])
def test_the_authors_library_writes_what_we_read(ratio, tiny):
    theirs = authors_adapter(tiny, ratio)
    assert close(logits(load("adapter", tiny)), logits(theirs), 1e-5)
    assert xpe.class_names(xpe.read_adapter("adapter")) == SIB200_LABELS_TXT.split()
    assert logits(theirs).std() > 0.1


@parametrize("kind", ["LSTM", "ATTN", "NONE"])
def test_another_encoder_of_the_authors_library_is_refused(kind, tiny):
    authors_adapter(tiny, 0.7, kind)
    with pytest.raises(groups.InputError, match=f"encoder is of type {kind}"):
        load("adapter", tiny)


# A tensor, its shape or one of its values, and words of the error.
BAD_TENSORS = """
prompt_embeddings                     | -    | prompt_embeddings: missing, where (0, 64) is wanted
base_model.classifier.dense.bias      | -    | base_model.classifier.dense.bias: missing
base_model.classifier.out_proj.weight | -    | base_model.classifier.out_proj.weight: missing
prompt_embeddings                     | 0 64 | prompt_embeddings has no rows, or a value
base_model.lora                       | 2    | base_model.lora: (2,), where none is wanted
prompt_encoder.embedding.weight       | 4 64 | prompt_encoder.embedding.weight: (4, 64), where none
base_model.classifier.out_proj.bias   | 8    | base_model.classifier.out_proj.bias: (8,), where (7,)
prompt_embeddings                     | 5 64 | 5 vectors, where num_virtual_tokens is 4
prompt_embeddings                     | 4 32 | prompt_embeddings: (4, 32), where (4, 64) is wanted
base_model.classifier.dense.bias      | nan  | dense.bias has no rows, or a value that is not finite
base_model.classifier.dense.bias      | inf  | dense.bias has no rows, or a value that is not finite
"""


@parametrize("row", lines_of(BAD_TENSORS))
def test_adapter_with_a_bad_tensor_is_refused(row, refused):
    name, value, words = row
    path = toy_adapter() / "adapter_model.safetensors"
    tensors = load_file(path)
    if value == "-":
        del tensors[name]
    elif value.isalpha():
        tensors[name][3] = float(value)
    else:
        tensors[name] = torch.ones(*map(int, value.split()))
    save_file(tensors, path)
    refused([words], "--toy --load adapter --languages fra_Latn")


ODD_ADAPTERS = """
adapter_config.json | peft_type          | "LORA"        | LORA holds no soft prompt
adapter_config.json | num_virtual_tokens | -4            | num_virtual_tokens is -4
adapter_config.json | num_virtual_tokens | "4"           | num_virtual_tokens is '4'
adapter_config.json | num_virtual_tokens | 4.0           | num_virtual_tokens is 4.0
xpe.json            | labels             | "abcdefg"     | labels are abcdefg
xpe.json            | labels             | {"a": 1}      | labels are {'a': 1}
xpe.json            | labels             | ["a", "b"]    | 7 classes | 2 are named: a, b
xpe.json            | labels             | ["a","b","c","d","e","f","f"] | 7 classes | 6 are named
xpe.json            | max_length         | "long"        | not a readable adapter | long
"""


@parametrize("row", lines_of(ODD_ADAPTERS))
def test_odd_adapter_is_refused_by_name(row, refused):
    name, key, value, *words = row
    edit(name, **{key: json.loads(value)})(toy_adapter())
    refused(words, "--toy --load adapter --languages fra_Latn")


@parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_unreadable_adapter_is_refused(name, refused):
    (toy_adapter() / name).write_text("{")
    refused("not a readable adapter", "--toy --load adapter")


def test_adapter_knows_the_length_of_its_texts(printed):
    folder = launch("--method spt --max-length 5", SHORT, 40)
    out = printed("--toy --languages eng_Latn --load", folder / "adapter")
    assert f"eng_Latn {result(folder)['accuracy']['eng_Latn']:5.1f}" in out


LINES = [TEXTS[2], "", TEXTS[0], TEXTS[1]]


def test_predict_labels_each_line(runs, tiny, refused, printed):
    path = Path("lines")
    path.write_text("\ufeff" + "\n".join(LINES), encoding="utf-8")         # a mark is no text
    folder = runs["xpe"] / "adapter"
    argv = "--toy --backbone", tiny, "--load", folder, "--predict"
    shown = [line.split("\t") for line in printed(*argv, path).splitlines()]
    assert [text for _, _, text in shown] == LINES
    assert shown.pop(1) == ["", "", ""]
    shares, classes = expected_of(load(folder, tiny), LINES).softmax(-1).max(-1)
    for (label, share, _), i in zip(shown, (0, 2, 3)):
        assert label == groups.LABELS[classes[i]]
        assert float(share) == pytest.approx(shares[i].item(), abs=1e-3)

    assert list(map(len, xpe.read_lines(path, size=3))) == [3, 1]
    path.write_bytes(b"one\rtwo\r\nthree")
    assert list(xpe.read_lines(path)) == [["one", "two", "three"]]
    path.write_bytes(b"fine\n\xff\xfe\n")
    refused("lines:2: not UTF-8", *argv, path)
    refused("gone", *argv, "gone")


def test_endless_input_gets_answers_in_utf8():
    toy_adapter()
    command = f"python {HERE}/xpe.py --toy --predict - --load adapter"
    piped = "bash", "-c", f"yes თბილისი | {command} | head -n 2"
    out, error = spawn(*piped, PYTHONIOENCODING="cp1252").communicate(timeout=600)
    assert out.count("\tთბილისი\n") == 2
    assert error.count("\n") <= 1


@parametrize("message", ["shapes", "CUDA error: an illegal memory access was encountered"])
def test_a_bug_is_no_line(message, monkeypatch):
    monkeypatch.setattr(xpe, "use_adapter", failing(RuntimeError(message)))
    with pytest.raises(RuntimeError, match=message):
        xpe.main(["--load", "adapter"])


@parametrize("place", ["use_adapter", "torch.zeros"])     # the other tries --device
@parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
])
def test_lack_of_memory_is_one_line(error, place, monkeypatch, capsys):
    monkeypatch.setattr(f"xpe.{place}", failing(error))
    assert xpe.main(["--load", "adapter"]) == 1
    assert re.fullmatch(r"xpe.py: \w+Error: .*emory.*--batch-size.*\n", capsys.readouterr().err)


def test_gpu_that_is_not_used_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", failing(RuntimeError("driver too old")))
    launch(SHORT, 2)


# ------------------------------------------------------------------- Encoders that a user brings

LOADED = "--toy --languages eng_Latn --max-length 32"
RUN = LOADED + " --source eng_Latn --prompt-length 6 --steps 2"
SMALL = dict(vocab_size=424, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=64, max_position_embeddings=130, pad_token_id=1, bos_token_id=0,
             eos_token_id=2)
BART = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_attention_heads=4, decoder_ffn_dim=64)
T5 = dict(d_kv=8, d_ff=64, num_layers=2, num_heads=4)
GOOD = {  # class of transformers -> its settings beside SMALL
    "XLMRobertaModel": {}, "CamembertModel": {}, "BertModel": {}, "MPNetModel": {}, "GteModel": {},
    "DebertaV2Model": dict(relative_attention=True, position_buckets=16, type_vocab_size=0,
                           pos_att_type="p2c|c2p", share_att_key=True, norm_rel_ebd="layer_norm",
                           position_biased_input=False),
    "ModernBertModel": dict(local_attention=8, global_attn_every_n_layers=2),
    "EuroBertModel": dict(num_key_value_heads=4),
    "DistilBertModel": dict(n_layers=2, n_heads=4, hidden_dim=64),
    "ElectraModel": dict(embedding_size=16), "AlbertModel": dict(embedding_size=16),
    "RemBertModel": dict(input_embedding_size=16, output_embedding_size=48),
    "T5EncoderModel": T5, "MT5ForConditionalGeneration": T5, "BartModel": BART, "M2M100Model": BART,
    "SqueezeBertModel": dict(embedding_size=32),
}
BAD = {  # class -> its settings, and what is said
    "LlamaModel": (dict(num_key_value_heads=4), "does not see the text"),
    "BertModel": (dict(is_decoder=True), "does not see the text"),
    "LongformerModel": (dict(attention_window=[4, 4]), "does not see the text"),
    "MobileBertModel": (dict(embedding_size=16, intra_bottleneck_size=16), "padding"),
    "ConvBertModel": (dict(embedding_size=32), "padding"),
    "EsmModel": (dict(mask_token_id=4, token_dropout=True), "unlike the tokens"),
    "CanineModel": ({}, "cannot load"),
    "CLIPTextModel": ({}, "cannot be prompted"),
}


def tiny_encoder(name, **settings):
    """A tiny random encoder and the toy's tokenizer in the folder `encoder`; -> the folder."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**SMALL | settings))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)        # so that differences show
    model.save_pretrained("encoder")
    tokenizer().save_pretrained("encoder")
    return Path("encoder")


@parametrize("pool", xpe.POOLS)
@parametrize("length", [6, 0])
@parametrize("name", GOOD)
def test_logits_by_hand_whatever_the_padding(name, length, pool):
    backbone, tokenizer = xpe.load_backbone(str(tiny_encoder(name, **GOOD[name])))
    prompt = xpe.SoftPrompt(length, xpe.width(backbone))
    model = xpe.PromptedClassifier(backbone, prompt, 7, pool).eval()
    texts = [*TEXTS, " ".join(f"topic{i}" for i in range(28))]
    examples = [xpe.Example(text, "a", "xx", 0) for text in texts]
    found = xpe.predict(model, xpe.tokenize(examples, ["a"], tokenizer))
    expected = expected_of(model, texts, position=length if pool == "bos" else 0)
    assert close(found, expected, 1e-4 * expected.std())


@parametrize("dtype", ["fp32", "bf16"])
@parametrize("name", GOOD)
def test_run_and_its_adapter(name, dtype, printed):
    tiny_encoder(name, **GOOD[name])
    folder = launch(RUN, "--backbone encoder --dtype", dtype)
    pefts = name in ("XLMRobertaModel", "CamembertModel")
    config = read_json(folder / "adapter/adapter_config.json")
    assert config["peft_type"] == ("PROMPT_TUNING" if pefts else "XPE_PROMPT")
    out = printed(LOADED, "--dtype", dtype, "--load", folder / "adapter")
    assert f"eng_Latn {result(folder)['accuracy']['eng_Latn']:5.1f}" in out


def test_rotary_angles_stay_in_fp32():
    tiny_encoder("EuroBertModel", num_key_value_heads=4)
    cfg = xpe.Config(backbone="encoder", dtype="bf16", max_length=32)
    model, _ = xpe.build_model(cfg, groups.LABELS)             # which tries it in fp32, too
    assert model.backbone.dtype == torch.bfloat16
    assert model.backbone.rotary_emb.inv_freq.dtype == torch.float32


@parametrize("name", BAD)
def test_encoder_that_cannot_be_prompted(name, refused):
    settings, words = BAD[name]
    tiny_encoder(name, **settings)
    refused(words, RUN, "--backbone encoder")
    assert not Path("runs").exists()


def weights(name="{}", keep="", factor=1, add=0, others=False):
    """A change of an encoder's weights: their names, which are kept (or changed), their values."""
    def change(folder):
        path = folder / "model.safetensors"
        there = load_file(path)
        tensors = {name.format(key): factor * there[key] + add for key in there if keep in key}
        tensors = (there if others else {}) | tensors
        save_file(tensors, path, metadata={"format": "pt"})
    return change


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def hostile(folder):
    """Code of its own, which would leave a file."""
    (folder / "evil.py").write_text("open('executed', 'w')\nclass C: pass\n")
    edit("config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})(folder)


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@parametrize("change, words", [
    (without_tokenizer, "is not the encoder's: it has"),
    (weights(name="foreign.{}"), "do not fill the encoder: embeddings.LayerNorm.bias"),
    (weights(keep="embeddings"), "do not fill the encoder: encoder.layer.0"),
    (weights(factor=torch.nan), "are not finite"),
    (edit("tokenizer_config.json", pad_token=None), "padding is None"),
    (edit("config.json", pad_token_id=None), "cannot be prompted"),
    (content("config.json", b"{garbage"), "not a valid JSON"),
    (content("model.safetensors", b"version https://git-lfs"), "SafetensorError"),
    (edit("tokenizer.json", post_processor=None), "no special token"),
    (hostile, "custom code"),
])
def test_broken_encoder_is_refused(change, words, monkeypatch, refused):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    change(tiny_encoder("XLMRobertaModel"))
    pool = "bos" if "special" in words else "first"
    refused(words, RUN, "--backbone encoder --pool", pool)
    assert not Path("runs").exists()
    assert not Path("executed").exists()


@parametrize("change", [
    edit("config.json", return_dict=False, chunk_size_feed_forward=4),
    edit("config.json", gradient_checkpointing=True),
    edit("tokenizer_config.json", model_input_names=["input_ids"]),
])
def test_settings_of_an_encoder_that_do_not_matter(change):
    change(tiny_encoder("XLMRobertaModel"))
    launch(RUN, "--backbone encoder")


@parametrize("name, table", [("BertModel", 128), ("XLMRobertaModel", 130)])
def test_room_is_used_to_the_last_position(name, table, refused):
    tiny_encoder(name, max_position_embeddings=table)
    argv = RUN, "--backbone encoder --max-length"
    refused("--prompt-length 6 + --max-length 123: more than the 128", *argv, 123)
    launch(*argv, 122)


def test_adapter_of_another_encoder(refused):
    """ELECTRA's own head has the same names, and another activation."""
    folder = toy_adapter(length=1)
    tiny_encoder("ElectraModel", hidden_size=64, embedding_size=64)
    argv = LOADED, "--backbone encoder --load adapter"
    refused("PEFT's head for electra is not XLM-R's", *argv)
    edit("adapter_config.json", peft_type="XPE_PROMPT")(folder)
    assert call(*argv) == 0


# -------------------------------------------------------------------------------------- Benchmark

@parametrize("method, dtype", [("spt", "bf16"), ("full", "fp32")])
def test_benchmark_counts_operations_as_torch_does(method, dtype, tiny, monkeypatch, printed):
    counted = []

    def measure(work, **_):                        # whatever the work is: 8 microseconds
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops() / 8000)
        return 8e-6

    monkeypatch.setattr(xpe.timeit, "timeit", measure)
    argv = "--toy --benchmark --method", method, "--dtype", dtype, "--backbone", tiny
    lines = printed(*argv).splitlines()
    rates = [int(line.split()[-2]) for line in lines[1:4]]
    assert rates[0] == pytest.approx(counted[0], abs=1)
    if method == "full":
        assert rates[1] == pytest.approx(3 * rates[2], abs=3)
    else:                                          # in bf16 torch counts the attention, too
        assert rates == pytest.approx(counted[:3], abs=1)


def test_benchmark_times_the_step_that_trains(tiny, monkeypatch):
    calls = []
    step = xpe.train_step
    monkeypatch.setattr(xpe, "train_step", lambda *given: calls.append(given) or step(*given))
    assert call("--toy --benchmark --backbone", tiny) == 0
    assert len(calls) == 1 + 6 * 8                 # one counts the operations


# ---------------------------------------------------------------------------------- Files as text

def pasted(title, **names):
    """What xpe.py's section of this title defines where nothing but torch and `names` is there."""
    parts = re.split(r"^# -{20,}\s*|^# ={20,}$", read("xpe.py"), flags=re.M)
    text = next(part for part in parts if part.startswith(title))
    names["torch"] = torch
    exec("#" + text, names)
    return names


@pytest.fixture
def copied():
    """(names of the README's copying section after its first block, the second block)."""
    text = read("README.md").split("## Copying from it")[1].split("\n## ")[0]
    first, second = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    ids = torch.full((2, 6), 5)
    names = pasted("Optimizer and schedule", math=math)
    names |= pasted("The prompts", nn=nn, F=F)
    toy = types.SimpleNamespace(from_pretrained=lambda name, add_pooling_layer: encoder())
    names |= dict(AutoModel=toy, batches=[(ids, torch.ones_like(ids), ids[:, 0])] * 3)
    exec(first, names)
    return names, second


def test_readmes_training_runs_as_it_stands(copied):
    names, _ = copied
    model = names["model"]
    assert len(names["rest"]) == 1 + 6 + 4
    assert model.backbone.training
    for ours, p in zip(encoder().parameters(), model.backbone.parameters(), strict=True):
        assert torch.equal(ours, p)
    for p in names["free"] + names["rest"]:
        assert p in names["optimizer"].state


def test_readmes_adapter_runs_as_it_stands(copied):
    prompts, second = copied
    prompts["backbone"].config.name_or_path = "another"        # which is noted
    error = type("InputError", (ValueError,), {})
    names = pasted("Files", contextlib=contextlib, os=os, Path=Path, InputError=error) | prompts
    names |= dict(json=json, sys=sys, NamedTuple=NamedTuple, Path=Path, InputError=error)
    before = logits(names["model"].cache_prompt())
    names = pasted("Adapters", **names)
    exec(second, names)
    assert torch.equal(logits(names["model"].eval()), before)


METHOD = "SoftPrompt PromptedClassifier Adafactor Config train_step train run transfer"
HANDY = "fast RunFolder load_adapter check_settings load_backbone toy_backbone parse main"


def test_the_method_comes_first():
    before, first, second = re.split(r"^# Part I+:", read("xpe.py"), flags=re.M)
    kinds = {type(node) for node in ast.parse(before).body}
    assert kinds == {ast.Expr, ast.Import, ast.ImportFrom}     # the first is the docstring
    assert set(METHOD.split()) <= set(re.findall(r"^(?:class|def) (\w+)", first, flags=re.M))
    assert set(HANDY.split()) <= set(re.findall(r"^(?:class|def) (\w+)", second, flags=re.M))


def test_help_is_whole_and_fits_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        xpe.parse(["--help"])
    shown = capsys.readouterr().out
    flags = {flag(field.name) for field in dataclasses.fields(xpe.Config)}
    assert flags <= set(re.findall(r"--[\w-]+", shown))
    assert max(map(len, shown.splitlines())) <= 80
    assert re.findall(r"^(\S.*):$", shown, flags=re.M)[-6:] == [*xpe.HELP_GROUPS.values()]
    assert "\n  --steps 24000         optimization steps (4.4)\n" in shown


@parametrize("where, fence", [
    ("README.md", r"^```\w*\n(.*?)^```"),
    ("xpe.py", r'\A.*?"""(.*?)"""'),
    ("groups.py", r'\A.*?"""(.*?)"""'),
])
def test_every_documented_command_parses(where, fence):
    blocks = re.findall(fence, read(where), flags=re.M | re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(r"python3? (xpe|groups)\.py\b([^|&;<>\n]*)", text)
    assert found
    for script, rest in found:
        parse = xpe.parse if script == "xpe" else groups.parse
        parse(shlex.split(rest, comments=True))


# ----------------------------------------------------------------------------------------- The bars

class Terminal(io.StringIO):
    """Standard error as on a terminal."""

    def isatty(self):
        return True

    def fileno(self):
        return 2


EPOCH = dict(epoch=1, step=7000, loss=1.5, dev_loss=1.5, lr=1e-3, dev_accuracy=61.0)


def test_one_bar_runs_over_all_epochs_of_a_resumed_run(monkeypatch, capsys):
    monkeypatch.setattr(os, "get_terminal_size", lambda file: os.terminal_size((80, 24)))
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = xpe.Progress(7000, 60 * 3600, [EPOCH])
    log = xpe.Log(xpe.Config(toy=True, steps=24_000), progress, 1.0)
    log.bar.mininterval = 0                        # drawn at each step, not each second
    log.bar.start_t -= 3600                        # as if it had begun an hour ago
    for accuracy in (50.0, 99.0):
        for _ in range(5):
            log.step(torch.tensor(1.5), 1e-3)
        progress.curve.append(EPOCH | {"dev_accuracy": accuracy})
        log.epoch(progress, 7)

    shown = re.split(r"[\r\n]", sys.stderr.getvalue())
    assert max(map(len, shown)) <= 80
    bars = re.findall(r"step (\d+)/24000 \|.*\| (\d+):.* dev (.*)", "\n".join(shown))
    steps, hours, dev = [list(dict.fromkeys(column)) for column in zip(*bars)]     # each once
    assert steps == [str(step) for step in range(7001, 7011)]
    assert hours == ["1"]                          # never from 0 again
    assert dev == ["61.0%", "50.0%"]
    assert {len(line) for line in capsys.readouterr().out.splitlines()} == {70}


@parametrize("classes, warned", [(1, True), (2, False)])
def test_log_warns_where_all_of_dev_is_one_class(classes, warned, capsys):
    progress = xpe.Progress(7000, 1.0, [EPOCH])
    xpe.Log(xpe.Config(toy=True), progress, 1.0).epoch(progress, classes)
    assert ("predicted as one class" in capsys.readouterr().out) == warned


@parametrize("codes, title", [
    (["fra_Latn", "kab_Latn"], "dev: 2 languages |"), (["kab_Latn"], "dev: 1 language |")])
def test_bar_of_an_evaluation_is_named(codes, title, monkeypatch):
    made = []
    monkeypatch.setattr(xpe, "tqdm", lambda things, **said: made.append(said) or things)
    xpe.evaluate(model_of(), toy_sentences(*codes), "dev")
    xpe.progress_bar("", range(9))                 # it has no title, and is not drawn
    assert made[0]["bar_format"].startswith(title)
    assert [bar["disable"] for bar in made] == [None, True]


def test_batches_of_an_evaluation_take_about_as_long():
    """So the bar's time left, which counts batches, is right though the longest come first."""
    lengths = np.random.default_rng(0).integers(5, 165, 41_820)
    batches = xpe.evaluation_batches(lengths, 20)
    positions = [len(batch) * (lengths[batch].max() + 20) for batch in batches[:-1]]
    assert min(positions) > 0.95 * max(positions)


# -------------------------------------------------------------------------------------- The signals

STOPPED = "xpe.py: stopped by {}; an unfinished run goes on with the same command\n"


def grid(*argv, **settings):
    """A process of run_all.sh."""
    return spawn("bash", HERE / "run_all.sh", *argv, **settings)


def test_slurm_task_is_stopped_with_one_line_and_goes_on_when_requeued():
    task = dict(SLURM_ARRAY_TASK_ID="1", STEPS="100000", SEEDS="0")
    process = grid("--toy", "table1", **task)
    read_until(process.stdout, " +2 ")             # the row of the second epoch
    process.terminate()
    assert ended(process) == (143, STOPPED.format("SIGTERM"))

    process = grid("--toy", "table1", **task)
    read_until(process.stdout, "going on from step")
    process.kill()
    process.communicate()


def at_terminal(argv, moment):
    """A run at a terminal, Ctrl-C once it shows `moment`; -> (exit code, all that it showed)."""
    keyboard, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, HERE / "xpe.py", *argv],
                               stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = ""
    with contextlib.suppress(OSError):             # when the other end is closed
        while select.select([keyboard], [], [], 600)[0]:
            shown += os.read(keyboard, 65536).decode(errors="replace")
            if moment in shown:
                process.send_signal(signal.SIGINT)
    process.kill()
    os.close(keyboard)
    return process.wait(), shown


@parametrize("moment", [
    "loading torch", "reading the", "step 0/", "dev: 1 language ", "test: 205 languages "])
def test_ctrl_c_answers_everywhere_with_one_line(moment):
    steps = "5" if "test" in moment else "100000"
    argv = f"--toy --source eng_Latn --steps {steps} --prompt-length 90"       # long enough a test
    code, shown = at_terminal(argv.split(), moment)
    assert code == 130
    last = shown.split("\r\x1b[K")[-1]             # what follows the clearing of the line
    last = last.replace("\x1b[A", "")              # a bar was just moving up
    assert last.split() == STOPPED.format("SIGINT").split()


WORK = {
    "sleep": "time.sleep(60)",
    "hash": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10 ** 9)",        # in C, without interpreter
    "import": "import torch; time.sleep(60)",
}


def program(work, *before):
    """A process that has become a program named xpe.py, and has begun this work."""
    script = "import sys; sys.argv = ['some/xpe.py']\nimport groups, hashlib, time\nprint('ready')"
    process = spawn(*before, "python", "-c", f"{script}\n{work}", PYTHONPATH=str(HERE))
    assert process.stdout.readline() == "ready\n"  # piped output comes line by line
    time.sleep(0.5)                                # until it is in the midst of it
    return process


@parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@parametrize("work", WORK)
def test_signal_ends_a_program_wherever_it_is(work, name):
    process = program(WORK[work])
    number = getattr(signal, name)
    process.send_signal(number)
    assert ended(process) == (128 + number, STOPPED.format(name))


def test_signal_that_nohup_ignores_stays_ignored():
    process = program(WORK["sleep"], "env", "--ignore-signal=HUP")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, STOPPED.format("SIGTERM"))


@parametrize("error, code, said", [
    (groups.InputError("a\n  b"), 2, "me: a b\n"),
    (FloatingPointError("nan"), 1, "me: nan\n"),
    (OSError("disk"), 1, "me: disk\n"),
    (MemoryError(), 1, "me: MemoryError\n"),
])
def test_errors_become_one_line_and_a_code(error, code, said, capsys):
    assert groups.guarded("me", failing(error)) == code
    assert capsys.readouterr().err == said


PRINTING = """
import groups
groups.as_program("groups.py")
raise SystemExit(groups.guarded("groups.py", lambda: print("a")))"""


@parametrize("command", [f"python -c '{PRINTING}'", f"python {HERE}/groups.py"])
@parametrize("where, words", [
    ("{} > /dev/full", "[Errno 28] No space left on device"),
    ("(sleep 1; {}) | true", "[Errno 32] Broken pipe"),        # by then, true has ended
])
def test_output_that_cannot_be_written_is_one_line(where, words, command, save):
    save("a", 50.0)
    shell = "bash", "-o", "pipefail", "-c", where.format(command)
    assert ended(spawn(*shell, PYTHONPATH=str(HERE))) == (1, f"groups.py: {words}\n")


def test_program_prints_names_that_the_locale_cannot(save):
    save("a", {"мова": 50.0, "\ud800": 60.0})
    process = spawn("python", HERE / "groups.py", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    out, error = process.communicate()
    assert error == ""
    assert "мова, \\ud800" in out


def test_importing_groups_loads_nothing_slow_and_changes_no_signal():
    script = """
import signal, sys
before = signal.getsignal(signal.SIGINT)
sys.argv = []
import groups
assert signal.getsignal(signal.SIGINT) is before
print([name for name in ("torch", "numpy", "matplotlib", "xpe") if name in sys.modules])"""
    assert spawn("python", "-c", script, PYTHONPATH=str(HERE)).communicate() == ("[]\n", "")


# ----------------------------------------------------------------------------------- The whole grid

def listed(*argv, **settings):
    """The lines of `run_all.sh --list`."""
    return grid("--list", *argv, **settings).communicate()[0].splitlines()


@pytest.fixture
def stub(tmp_path):
    """stub(text) puts a `python` in front: `text` is what it does, as sh, in place of a run."""
    def stub(text):
        (tmp_path / "bin").mkdir()
        python = tmp_path / "bin/python"
        python.write_text(f"""#!/bin/sh
case "$*" in
  *"xpe.py "*) {text} ;;
  *) exec {sys.executable} "$@" ;;
esac""")
        python.chmod(0o755)
        return python.parent
    return stub


def test_grid_lists_the_runs_of_the_paper():
    lines = listed("--dtype", "bf16")
    for line in lines:
        assert xpe.parse(shlex.split(line)[2:])
    assert not list(Path().iterdir())

    start = f"python {HERE}/xpe.py --out runs --steps 24000 --dtype bf16 --method"
    methods = "spt", "dual --xpe-ratio 0.3", "dual --xpe-ratio 0.7", "xpe"
    table1 = [f"{start} {method} --source {source} --seed {seed}"
              for method in methods for source in groups.SOURCES for seed in range(10)]
    few = "--steps 6000 --lr 1e-5 --dtype fp32 --prompt-length 0"
    table2 = [f"{start} full --source {source} {few} --seed {seed}"
              for source in ("eng_Latn", "arb_Arab", "zho_Hans") for seed in range(6)]
    after_joshi5 = f"{start} dual --xpe-ratio 0.7 --source joshi5 --target"
    table3 = []
    for code, seed in itertools.product(groups.FULL_SUPERVISION_TARGETS, range(6)):
        table3.append(f"{after_joshi5} {code} --target-steps 6000 --seed {seed}")
        table3.append(f"{start} full --source {code} {few} --languages {code} --seed {seed}")
    assert sorted(lines[:120]) == sorted(table1)
    assert sorted(lines[120:138]) == sorted(table2)
    assert sorted(lines[138:]) == sorted(table3)


def test_grid_lists_each_table_for_any_seeds():
    sizes = [len(listed(f"table{n}", SEEDS="3 5")) for n in (1, 2, 3)]
    assert sizes == [24, 6, 2 * 2 * 46]
    assert listed("table1", "table2") == listed()[:138]
    assert {line.split()[-1] for line in listed("table2", SEEDS="7")} == {"7"}


@parametrize("line", [
    "bash {} --list --steps 3", "bash {} --list --seed=1", "bash {} --list --out 3",
    "bash {} --list --method 3", "bash {} --list --source=seen", "bash {} --list tabel1",
    "STEPS=m bash {} --list --clip 3", "STEPS=3 bash {} --list", "JOBS=0 bash {} --list"])
def test_grid_refuses_what_it_sets_itself(line):
    code, error = ended(spawn("bash", "-c", line.format(HERE / "run_all.sh")))
    assert code == 2
    assert error.startswith("run_all.sh: ")
    assert error.count("\n") == 1


def test_killed_grid_goes_on():
    lines = listed("--toy", STEPS="60")
    script = lines[0] + " && " + lines[3]          # two cells: SPT and XPE, from Joshi5
    first, second = Path("runs/toy-spt-joshi5-s0"), Path("runs/toy-xpe-joshi5-s0")
    process = spawn("bash", "-c", script)
    await_checkpoint(second, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = files(first)
    assert not (second / "result.json").exists()

    again = spawn("bash", "-c", script)
    assert "going on from step" in again.communicate()[0]
    assert (second / "result.json").exists()
    assert files(first) == before


def test_grid_fails_loudly_and_the_other_runs_go_on(stub):
    path = stub("""echo "$*" >> ran
      case "$*" in *spt*enarzho*"--seed 1") echo "xpe.py: no luck" >&2; exit 1 ;; esac""")
    process = grid("--toy", path=path)
    output, error = process.communicate()
    ran = Path("ran").read_text().splitlines()
    assert process.returncode == 1
    assert len(ran) == len(set(ran)) == 46
    assert error.count("FAILED") == 1
    assert "13/46 spt-enarzho-s1: xpe.py: no luck\n13/46 spt-enarzho-s1: FAILED: " in error
    assert output.count(": done\n") == 45
    assert "46/46 full-kab_Latn-s1: done\n" in output


def test_grid_refuses_a_wrong_flag_before_any_run(stub):
    code, error = ended(grid("--toy", "--lrr", "1", path=stub("echo >> ran")))
    assert code == 2
    assert error == "run_all.sh: unrecognized arguments: --lrr 1; see --help\n"
    assert not Path("ran").exists()


def test_grid_knows_failed_from_stopped(stub):
    path = stub('case "$*" in *spt*) exit 143 ;; esac')
    code, error = ended(grid("--toy", "table1", path=path, SEEDS="0"))
    assert code == 1
    assert error.count(": stopped\n") == 3


def test_slurm_task_is_the_run_itself(stub):
    path = stub('echo "$$ $*" > ran')
    line = listed("--toy")[45]
    task = grid("--toy", path=path, SLURM_ARRAY_TASK_ID="46")
    assert task.communicate()[0] == line + "\n"
    # The same process: no shell is left to be signalled in its place.
    assert Path("ran").read_text() == f"{task.pid} {line.removeprefix('python ')}\n"

    code, error = ended(grid("--toy", SLURM_ARRAY_TASK_ID="47"))
    assert code == 2
    assert "46 lines" in error


def test_slurms_copy_of_the_grid_finds_its_folder_or_names_it(tmp_path):
    shutil.copy(HERE / "run_all.sh", "slurm_script")
    found = spawn("bash", "slurm_script", "--list", "table2", SLURM_SUBMIT_DIR=str(HERE))
    assert found.communicate()[0].splitlines() == listed("table2")
    code, error = ended(spawn("bash", "slurm_script", SLURM_SUBMIT_DIR=str(tmp_path)))
    assert code == 2
    assert f"no xpe.py in {tmp_path}" in error


def has_ended(pid):
    """Whether a process is gone, or a zombie that its parent has yet to collect."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_grid_ends_what_it_started(number, stub):
    process = grid("--toy", path=stub("echo $$ >> pids; exec sleep 60"))
    while not Path("pids").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    stopped = "run_all.sh: stopped; the same command goes on\n"
    assert ended(process) == (128 + number, stopped)
    pids = Path("pids").read_text().split()
    assert pids
    assert all(map(has_ended, pids))


@parametrize("finished, runs", [
    ("True", 0),
    ("'dual' in argv or 1 / ('xpe' in argv)", 3)])  # SPT's raise an error, and XPE's are finished
def test_finished_grid_runs_nothing_and_loads_torch_once(finished, runs, stub):
    for name in ("run_all.sh", "groups.py"):
        shutil.copy(HERE / name, ".")
    Path("ran").touch()
    Path("xpe.py").write_text(f"""
print("loaded", file=open("loaded", "a"))
parse = read_rows = list
def finished(argv):
    return {finished}
""")
    argv = "run_all.sh", "--toy", "table1"
    output = spawn("bash", *argv, path=stub("echo >> ran"), SEEDS="0").communicate()[0]
    assert Path("loaded").read_text() == "loaded\n"
    assert Path("ran").read_text() == "\n" * runs
    assert output.count(": done\n") == runs


# --------------------------------------------------------------------------------------- groups.py

SIZES = dict(LANGUAGES=205, LABELS=7, ENARZHO=3, JOSHI5=7, SEEN=92, UNSEEN=113, LOW_PERFORMING=46,
             FULL_SUPERVISION_SEEN=23, FULL_SUPERVISION_UNSEEN=23)
NESTED = """
ENARZHO                 | JOSHI5
JOSHI5                  | SEEN
LOW_PERFORMING          | UNSEEN
FULL_SUPERVISION_SEEN   | SEEN
FULL_SUPERVISION_UNSEEN | UNSEEN
"""
COLUMNS = {
    "zs_eng": ("SIB-200", "eng_Latn"),
    "zs_ara": ("SIB-200", "arb_Arab"),
    "zs_zho": ("SIB-200", "zho_Hans"),
    "gpt35": ("GPT-3.5", "-"),
    "gpt4": ("GPT-4", "-"),
}


def test_groups_have_their_sizes_and_nest():
    sets = {name: set(getattr(groups, name)) for name in SIZES}
    assert {name: len(getattr(groups, name)) for name in SIZES} == SIZES
    assert {name: len(codes) for name, codes in sets.items()} == SIZES     # each once
    for small, large in lines_of(NESTED):
        assert sets[small] < sets[large]
    assert [len(codes) for codes in groups.TARGET_GROUPS.values()] == [46, 113, 85, 198]
    assert "nqo_Nkoo" in groups.LOW_PERFORMING
    both = sets["FULL_SUPERVISION_UNSEEN"] & sets["LOW_PERFORMING"]
    assert len(both) == 11                         # section 4.2


def gap(column, group, nko=None):
    """Distance of the mean of the published scores, with this one for N'Ko, from the Table 2."""
    scores = {code: getattr(row, column) for code, row in groups.LANGUAGES.items()}
    scores["nqo_Nkoo"] = nko
    known = [scores[code] for code in groups.TARGET_GROUPS[group] if scores[code] is not None]
    place = list(groups.TARGET_GROUPS).index(group)
    return abs(fmean(known) - groups.TABLE2[COLUMNS[column]][place])


def come_out(columns, wanted, nko=None):
    """Do all these cells come out with this score of N'Ko?"""
    return max(gap(column, group, nko) for column in columns for group in wanted) < 0.0501


def test_published_numbers():
    sums = [round(sum(column), 1) for column in zip(*groups.TABLE1.values())]
    assert sums == [586.7, 591.8, 596.3, 590.3]
    assert groups.TABLE2["Phi-3.5-mini", "-"] == (None, None, 49.02, None)
    assert groups.TABLE3 == {"Unseen": (64.0, 65.1), "Seen": (88.3, 87.6), "All": (76.1, 76.3)}
    zero_shot, gpt = ("zs_eng", "zs_ara", "zs_zho"), ("gpt35", "gpt4")
    assert come_out(COLUMNS, [SEEN])
    assert come_out(gpt, [UNSEEN, ALL])
    fits = [come_out(zero_shot, [LOW, UNSEEN, ALL], nko) for nko in (25.8, 25.9, 26.9, 27.0)]
    assert fits == [False, True, True, False]
    fits = [come_out(gpt, [LOW], nko) for nko in (3.3, 3.4, 7.8, 7.9)]
    assert fits == [False, True, True, False]


WITH_EGYPTIAN = [{"yue_Hant": "arz_Arab"}.get(code, code)
                 for code in groups.FULL_SUPERVISION_UNSEEN]


@parametrize("codes, mean", [
    (groups.FULL_SUPERVISION_SEEN, 88.3),
    (groups.FULL_SUPERVISION_UNSEEN, 64.0),
    (groups.FULL_SUPERVISION_TARGETS, 76.1),
    (WITH_EGYPTIAN, 64.0),                         # Arabic fits as well as Yue Chinese
])
def test_targets_of_full_supervision_give_table_3(codes, mean):
    assert round(fmean(groups.LANGUAGES[code].xlmr_large for code in codes), 1) == mean


def test_authors_notes_stand_beside_the_papers_leads():
    for group, note in groups.AUTHORS_NOTES.items():
        paper = groups.TABLE1[group, "joshi5"]
        assert note.endswith(f" (paper {paper[3] - paper[0]:+.1f})")


@parametrize("text, codes", [
    ("all", "xx_Latn eng_Latn arb_Arab zho_Hans"),
    ("enarzho", "arb_Arab eng_Latn zho_Hans"),
    ("zho_Hans, enarzho,xx_Latn", "zho_Hans arb_Arab eng_Latn xx_Latn"),
])
def test_names_and_codes_are_resolved_once_each_in_order(text, codes):
    available = ["xx_Latn", "eng_Latn", "arb_Arab", "zho_Hans"]
    assert groups.resolve(text, available, "mine") == codes.split()
    full = groups.resolve("full", list(groups.LANGUAGES), "mine")
    assert full == groups.FULL_SUPERVISION_TARGETS


PRINTED = """\
awa_Deva  50.0  fra_Latn  90.0  kab_Latn  40.0  mine  70.0  nqo_Nkoo  30.0  xx  80.0
yy  60.0

best dev accuracy 81.3%, 12 s of training

target group      languages  accuracy
Low-performing            2     35.0%
Unseen                    3     40.0%
All w/o Joshi5            3     40.0%
All tested                7     60.0%
A toy (synthetic languages or a random encoder): its numbers mean nothing about real ones.
"""


def test_result_is_printed_with_own_languages_in_the_mean(capsys):
    accuracy = dict(nqo_Nkoo=30.0, kab_Latn=40.0, awa_Deva=50.0, yy=60.0, mine=70.0, xx=80.0)
    accuracy["fra_Latn"] = 90.0
    training = dict(dev_accuracy=81.26, seconds=12.4)
    groups.print_result(dict(config={"toy": True}, accuracy=accuracy, **training))
    assert capsys.readouterr().out == PRINTED
    groups.print_result(dict(config={}, accuracy=accuracy))
    out = capsys.readouterr().out
    assert "best dev" not in out
    assert "mean nothing" not in out


# -------------------------------------------------------------------------- The tables of groups.py

@pytest.fixture
def save(empty_folder):
    """save(name, accuracy, right, **config) leaves a run's result.json in runs.

    A number stands for all the languages.  `right`, the answers of each sentence in order, leaves
    predictions.csv too, where each label is a, and then gives the accuracy.
    """
    def save(name, accuracy, right=None, digests={}, as_start=None, **config):
        defaults = dict(method="spt", xpe_ratio=0.0, source="joshi5", target="", seed=0,
                        toy=False, steps=100, backbone="b", languages="all")
        if not isinstance(accuracy, dict):
            accuracy = dict.fromkeys(groups.LANGUAGES, accuracy)
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        if right:
            accuracy = {code: 100 * fmean(answers) for code, answers in right.items()}
            lines = [f"{code},{row},a,{'ba'[answer]}\n" for code, answers in right.items()
                     for row, answer in enumerate(answers)]
            text = "language,row,label,predicted\n" + "".join(lines)
            (folder / "predictions.csv").write_text(text)
        run = dict(config=defaults | config, accuracy=accuracy, digests=digests, as_start=as_start)
        (folder / "result.json").write_text(json.dumps(run))
    return save


@pytest.fixture
def rows(capsys):
    """rows(*start): of all rows of the tables of runs that begin with it, the cells behind it."""
    def rows(*start):
        capsys.readouterr()
        assert groups.main([]) == 0
        found = lines_of(capsys.readouterr().out.replace("\\|", "/"))
        end = 1 + len(start)
        return [cells[end:-1] for cells in found if cells[1:end] == [*start]]
    return rows


DUAL = dict(method="dual", xpe_ratio=0.7)


def test_mean_deviation_and_difference(save, rows):
    for seed, percent in enumerate((50.0, 52.0, 57.0)):
        save(f"s{seed}", percent, seed=seed)
    save("d", 60.0, **DUAL)
    spt = "53.0 ± 3.6 (3) · 36.0 · +17.0"          # deviations -3, -1, 4: sqrt(26 / 2) = 3.6
    dual = "60.0 (1) · 37.3 · +22.7"
    assert rows(LOW, "joshi5") == [[spt, "· 36.8", dual, "· 39.1"]]
    assert rows("XPE", "seen") == [["· 41.9", "· 60.8", "", ""]]


def test_paired_difference_without_predictions_claims_no_interval(save, rows):
    half = {code: 54.0 for code in groups.LOW_PERFORMING[:23]}         # 4 on one half: 2
    save("a", 50.0)
    save("b", 10.0, seed=1)
    save("c", 90.0, seed=5, **DUAL)                # no seed in common: no row
    save("x", dict.fromkeys(groups.LANGUAGES, 50.0) | half, method="xpe")
    lead = "s0 +2.0; no interval: predictions.csv is missing or of another length"
    note = "+2.03 ± 1.34 (paper +3.1)"
    assert rows("XPE - SPT", "joshi5", LOW) == [["+2.0", lead, note]]
    assert rows("DUAL-70 - SPT") == []


@parametrize("source", ["seen", "seen,eng_Latn"])
def test_no_paired_difference_where_a_group_holds_a_source(source, save, rows):
    save("s", 50.0, source=source)
    save("z", 50.0, source=source, method="xpe")
    found = rows("XPE - SPT", source)
    assert [cells[:2] for cells in found] == [[LOW, "+0.0"], [UNSEEN, "+0.0"]]


@parametrize("answers, cells", [
    ([([0, 1], [1, 1])] * 2, ["+50.0 [+0.0, +100.0]", "s0 +50.0, s1 +50.0"]),
    ([([0, 1], [1, 1])] * 4, ["+50.0 [+0.0, +100.0]", "4 seeds"]),     # of two sentences, one leads
    ([([0, 1], [1, 1])], ["+50.0", "s0 +50.0; no interval from one seed"]),
])
def test_interval_stands_beside_the_seeds_or_their_number(answers, cells, save, rows):
    codes = groups.TARGET_GROUPS[SEEN]
    for seed, (spt, xpe_) in enumerate(answers):
        save(f"s{seed}", {}, dict.fromkeys(codes, spt), seed=seed)
        save(f"x{seed}", {}, dict.fromkeys(codes, xpe_), seed=seed, method="xpe")
    (seen,) = rows("XPE - SPT", "joshi5", SEEN)
    assert seen[:2] == cells


def seeds_lead(ahead, behind, n):
    """Of the seeds so many lead, and so many do not, in each of n sentences."""
    return np.repeat([[1], [0]], [ahead, behind], axis=0) * np.ones(n)                 # (seeds, n)


def sentences_lead(n):
    """Half of n sentences, with both of two seeds."""
    return np.array([[1, 0] * (n // 2)] * 2)                                           # (2, n)


@parametrize("leads, half", [      # an array (seeds, sentences) per language; half of the interval
    ([sentences_lead(204)] * 46, 1.96 * 50 / 204 ** 0.5),
    ([np.ones((2, 204)), np.zeros((2, 204))] * 23, 1.96 * 50 / 46 ** 0.5),
    ([sentences_lead(16), sentences_lead(64)] * 20, 1.96 * 50 * (1 / 64 + 1 / 256) ** 0.5),
    ([seeds_lead(1, 1, 4)] * 3, 12.706 * 50),      # Student's t at 97.5 %, of 1 and of 19 degrees
    ([seeds_lead(10, 10, 4), seeds_lead(10, 10, 8)] * 3, 2.093 * 50 / 19 ** 0.5),
])
def test_interval_by_hand(leads, half):
    assert groups.interval(leads) == pytest.approx([50 - half, 50 + half], abs=0.06 * half)


# The lines behind the header, where half are right in result.json.
BAD_PREDICTIONS = r"""
en,0,a,b\nen,1,a,b\n   | csv: .*another accuracy of en
en,0,a,a\nen,2,a,b\n   | csv: .*en: row 2, should be 1
en,0,a,a\n             | csv: .*another accuracy of en
en,0,a,a\nen,1,a\n     | csv: .*ValueError
de,0,a,a\nde,1,a,b\n   | csv: .*KeyError
en\xff,0,a,a\nen,1,a,b | csv: .*Unicode
cut off                | csv.gz: .*EOFError
"""


@parametrize("row", lines_of(BAD_PREDICTIONS))
def test_predictions_of_another_run_are_refused(row, save):
    lines, words = row
    save("a", {"en": 50.0})
    content = unescaped("language,row,label,predicted\n" + lines)
    path = Path("runs/a/predictions.csv")
    if "gz" in words:
        path, content = path.with_suffix(".csv.gz"), gzip.compress(content)[:-9]
    path.write_bytes(content)
    (run,) = groups.load_runs("runs")
    with pytest.raises(groups.InputError, match=f"a/predictions.{words}"):
        run.answers


def test_settings_are_kept_apart_and_languages_must_be_whole(save, capsys, rows):
    save("a", 50.0)
    save("b", 60.0, seed=1, steps=200)
    save("c", dict.fromkeys(groups.UNSEEN, 70.0), seed=3, languages="some")
    save("e", 65.0, seed=1, digests=dict(encoder="another"))       # of the same name
    save("t", 1.0, seed=2, steps=200, toy=True)
    of_all = [row[0].split(" · ")[0] for row in rows(ALL, "joshi5")]
    assert of_all == ["50.0 (1)", "60.0 (1)", "65.0 (1)", "1.0 (1)"]
    assert rows(UNSEEN, "joshi5")[0][0] == "60.0 ± 14.1 (2) · 56.0 · +4.0"

    groups.main([])
    out = capsys.readouterr().out
    assert "follow 4 times" in out
    assert "toy runs" in out
    assert f"languages: {SEEN} 1, {ALL} 1." in out
    assert "## zero-shot steps=200, zero-shot toy=False, zero-shot encoder=None\n" in out


def test_every_setting_has_a_heading(save, capsys):
    save("a", 50.0)
    save("b", 60.0, seed=1, newer=1)
    groups.main([])
    headings = re.findall("^## (.*)", capsys.readouterr().out, re.M)
    assert headings == ["without what the other headings name", "zero-shot newer=1"]


def test_a_setting_that_all_runs_share_stands_above_their_tables(save, capsys):
    save("a", 50.0, recipe="released", lr=0.5)
    groups.main([])
    assert "; recipe released; lr 0.5; " in capsys.readouterr().out


def test_full_supervision(save, rows):
    kab, yue = 39.5, 88.9                          # SIB-200's published accuracies
    full = dict(method="full", xpe_ratio=None, steps=9)
    save("f", {"kab_Latn": 40.5, "yue_Hant": 0.0}, source="kab_Latn", **full)
    save("e", 60.0, source="eng_Latn", **full)     # beside SIB-200's zero-shot from English
    for seed, code, percent in (
            (0, "kab_Latn", kab + 1), (1, "kab_Latn", kab + 3), (2, "kab_Latn", kab + 8),
            (0, "yue_Hant", yue + 1), (1, "yue_Hant", yue + 3)):       # 2: not in the deviation
        save(f"{code}{seed}", {code: percent}, target=code, seed=seed, steps=7,
             init_from=f"s{seed}", **DUAL)
    assert rows("SIB-200", "eng_Latn")[0][1] == "60.0 (1) · 54.0 · +6.0"
    kabyle = "40.5 (1) · 39.5 · +1.0"
    assert rows("Unseen", "Full") == [["1 of 23", kabyle, "64.0"]]
    both = "67.2 ± 1.4 (2) · 64.2 · +3.0"
    assert rows("All", "DUAL-70") == [["2 of 46", both, "76.3"]]


def test_targets_that_started_from_other_steps_are_not_averaged(save, rows):
    for seed, steps in enumerate((20, 300)):
        save(f"s{seed}", 50.0, steps=steps, seed=seed, **DUAL)
        save(f"t{seed}", {"kab_Latn": 50.0 + seed}, seed=seed, target="kab_Latn",
             init_from=f"s{seed}", **DUAL)
    scores = {row[1].split(" · ")[0] for row in rows("All", "DUAL-70")}
    assert scores == {"50.0 (1)", "51.0 (1)"}


def test_targets_of_a_start_that_was_made_again_are_not_averaged(save, rows):
    for seed, start in enumerate("aa"):
        save(f"s{seed}", 50.0, seed=seed, as_start=start)
        save(f"t{seed}", {"kab_Latn": 50.0 + seed}, seed=seed, target="kab_Latn",
             init_from=f"s{seed}", digests=dict(start="a"))
    assert [row[1] for row in rows("SPT", "joshi5", "kab_Latn")] == ["50.5 ± 0.7 (2)"]
    shutil.rmtree("runs/s0")
    save("s0", 50.0, as_start="b")
    scores = {row[1] for row in rows("SPT", "joshi5", "kab_Latn")}
    assert scores == {"50.0 (1)", "51.0 (1)"}


def test_result_tells_what_runs_that_start_from_it_note(transferred):
    folders = [transferred / "a" / f"toy-dual70-eng_Latn-{name}"
               for name in ("s0", "lao_Laoo-s0", "kab_Latn-s0")]
    source, *targets = [result(folder) for folder in folders]
    assert {target["digests"]["start"] for target in targets} == {source["as_start"]}


def test_kinds_tested_on_other_sentences_are_not_compared(save, rows, refused):
    full = dict(method="full", xpe_ratio=None, source="kab_Latn", languages="kab_Latn")
    save("f", {"kab_Latn": 50.0}, digests={"test sentences": "1"}, **full)
    save("t", {"kab_Latn": 50.0}, digests={"test sentences": "1"}, target="kab_Latn",
         languages="kab_Latn")
    assert rows("SPT", "joshi5", "kab_Latn") != []
    save("u", {"kab_Latn": 50.0}, digests={"test sentences": "2"}, target="kab_Latn",
         languages="kab_Latn", seed=1)
    refused("runs/f and runs/u: not the same test sentences", main=groups.main)


@parametrize("what, languages", [
    ("training sentences", "all"),
    ("training sentences", "xx"),
    ("test sentences", "all"),
])
def test_runs_on_other_sentences_are_not_compared(what, languages, save, rows, refused):
    save("a", 50.0, digests={what: "1"})
    save("b", 60.0, seed=1, method="xpe", digests={what: "1"})
    save("c", 60.0, seed=1, source="seen", digests={"training sentences": "2", what: "1"})
    assert rows(LOW, "joshi5") != []
    save("d", 60.0, seed=2, method="xpe", languages=languages, digests={what: "3"})
    refused(f"runs/a and runs/d: not the same {what}", main=groups.main)


def test_runs_tested_in_other_languages_have_other_test_sentences(save, rows):
    save("a", 50.0, digests={"test sentences": "1"})
    save("b", 60.0, seed=2, method="xpe", languages="xx", digests={"test sentences": "3"})
    assert rows(LOW, "joshi5") != []


def test_start_that_changed_is_refused(save, rows, refused):
    save("a", {"kab_Latn": 50.0}, target="kab_Latn", init_from="s", digests=dict(start="1"))
    save("b", {"yor_Latn": 50.0}, target="yor_Latn", init_from="s", digests=dict(start="1"))
    assert rows("SPT", "joshi5", "yor_Latn") != []
    save("c", {"lao_Laoo": 50.0}, target="lao_Laoo", init_from="s", digests=dict(start="2"))
    refused("runs/a and runs/c: not the same start", main=groups.main)


def test_targets_of_starts_that_are_not_there_are_not_averaged(save, rows):
    for seed in (0, 1):
        save(f"t{seed}", {"kab_Latn": 50.0 + seed}, seed=seed, target="kab_Latn",
             init_from=f"s{seed}", digests=dict(start=seed))
    assert {row[1] for row in rows("SPT", "joshi5", "kab_Latn")} == {"50.0 (1)", "51.0 (1)"}


def test_runs_that_went_on_from_others_are_told(save, capsys):
    save("a", 50.0, init_from="s")
    save("b", {"kab_Latn": 50.0}, target="kab_Latn", init_from="t")
    groups.main([])
    assert "\n1 went on from s.\n" in capsys.readouterr().out


@parametrize("start, said", [("s0", True), ("s1", False)])
def test_seeds_that_share_their_start_are_told(start, said, save, capsys):
    for seed, init_from in enumerate(("s0", start)):
        save(f"s{seed}", 50.0, seed=seed)
        save(f"t{seed}", {"kab_Latn": 50.0}, seed=seed, target="kab_Latn", init_from=init_from)
    groups.main([])
    assert ("share their start" in capsys.readouterr().out) == said


@parametrize("ratio, label", [(0.3, "DUAL-30"), (0.29, "DUAL-29"), (0.299, "DUAL-29.9")])
def test_ratios_that_are_not_the_papers_have_names_of_their_own(ratio, label):
    assert groups.label_of("dual", ratio) == label


def test_every_run_has_a_row_also_without_a_cell_in_the_paper(save, rows, refused):
    save("a", {"xx": 50.0, "yy|y": 60.0})
    save("b", {"xx": 60.0, "yy|y": 70.0}, seed=1)
    save("c", {"xx": 90.0}, seed=2, method="xpe")  # others: never averaged
    save("d", 70.0, seed=3, method="dual", xpe_ratio=0.5)
    assert rows("SPT", "joshi5", "") == [["xx, yy/y", "60.0 ± 7.1 (2)"]]
    assert rows("XPE", "joshi5", "") == [["xx", "90.0 (1)"]]
    assert rows("DUAL-50", "joshi5", "") == [["205 languages", "70.0 (1)"]]
    save("e", {"xx": 90.0, "yy|y": 90.0}, seed=1)
    refused("runs/b and runs/e are the same run", main=groups.main)


LANGUAGES_CSV = """\
run,setting,method,ratio,source,target,seed,code,name,seen,low_performing,accuracy
a,1,SPT,0.0,joshi5,,0,nqo_Nkoo,N’ko,0,1,30.0
a,1,SPT,0.0,joshi5,,0,fra_Latn,French,1,0,40.0
a,1,SPT,0.0,joshi5,,0,mine,,0,0,9.5
b,2,SPT,0.0,joshi5,,0,fra_Latn,French,1,0,50.0
c,1,SPT,0.0,joshi5,,1,fra_Latn,French,1,0,60.0
"""


def test_csv_has_a_row_per_run_and_language(save):
    save("a", {"nqo_Nkoo": 30.0, "fra_Latn": 40.0, "mine": 9.5})
    save("b", {"fra_Latn": 50.0}, steps=200)
    save("c", {"fra_Latn": 60.0}, seed=1)
    assert groups.main(["--csv", "x.csv"]) == 0
    assert Path("x.csv").read_text(encoding="utf-8") == LANGUAGES_CSV


@pytest.fixture
def drawn(monkeypatch):
    """drawn(): the figure that --plot saves."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    kept = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: kept.append(self))

    def drawn():
        assert groups.main(["--plot", "x.png"]) == 0
        return kept[0]
    return drawn


def test_plot_draws_every_language_and_says_of_what(save, drawn):
    save("a", 50.0, backbone="hub/enc")
    save("b", 60.0, backbone="hub/enc", seed=1)
    save("c", 70.0, backbone="hub/enc", **DUAL)
    save("e", 60.0, backbone="hub/enc", steps=200)             # another setting, with fewer runs
    save("f", dict.fromkeys(groups.LOW_PERFORMING, 90.0), backbone="hub/enc", seed=2)  # not whole
    figure = drawn()
    title = "joshi5: enc, 100 steps\nzero-shot steps=100\nBold"
    assert title in figure.get_suptitle()
    codes = [tick.get_text() for axes in figure.axes for tick in axes.get_xticklabels()]
    assert codes == [*groups.SEEN, *groups.UNSEEN]             # all alike: by code
    for axes in figure.axes:
        lines = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
        guessing = lines["always the most frequent label"]
        assert (lines["SPT, 2 seeds"], lines["DUAL-70, 1 seed"], guessing) == (55.0, 70.0, 25.0)


def test_plot_draws_own_languages_without_what_is_not_theirs(save, drawn):
    save("a", {"xx": 50.0, "yy": 20.0}, **DUAL)
    save("b", {"xx": 10.0, "yy": 90.0})
    (axes,) = drawn().axes
    assert axes.get_title(loc="left") == "Own languages"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["yy", "xx"]    # by DUAL-70
    assert "always the most frequent label" not in [line.get_label() for line in axes.lines]


# SPT stands for the settings of a run; of a key that is there twice JSON takes the second.
ODD_RESULTS = r"""
{
[]
5
null
\xff
{"config": {}}
{"config": [], "accuracy": {}}
{"config": {SPT}, "accuracy": {}}
{"config": {SPT}, "accuracy": {"en": 5}, "digests": [1]}
{"config": {SPT}, "accuracy": {"en": "50"}}
{"config": {SPT}, "accuracy": {"en": null}}
{"config": {SPT}, "accuracy": {"en": NaN}}
{"config": {SPT}, "accuracy": {"en": -1}}
{"config": {SPT}, "accuracy": {"en": Infinity}}
{"config": {SPT}, "accuracy": {"en": [5]}}
{"config": {SPT, "method": null}, "accuracy": {"en": 5}}
{"config": {SPT, "source": 5}, "accuracy": {"en": 5}}
{"config": {SPT, "seed": [1]}, "accuracy": {"en": 5}}
{"config": {SPT, "target": {}}, "accuracy": {"en": 5}}
{"config": {SPT, "method": "dual", "xpe_ratio": "x"}, "accuracy": {"en": 5}}
{"config": {SPT, "method": "dual", "xpe_ratio": Infinity}, "accuracy": {"en": 5}}
"""


@parametrize("text", ODD_RESULTS.strip().splitlines())
def test_other_files_than_results_are_refused(text, refused):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/result.json").write_bytes(unescaped(text.replace("SPT", SPT)))
    refused("groups.py: runs/a/result.json: not the result of a run", main=groups.main)


def test_wrong_arguments_are_one_line(save, refused):
    by_groups = functools.partial(refused, main=groups.main)
    by_groups("no finished run", "none")
    by_groups(".svg", "--plot x.jpg")
    by_groups("--bogus", "--bogus")
    save("a", 50.0, method="full")
    by_groups("no zero-shot run", "--plot x.png")
