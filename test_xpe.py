"""The tests, offline and on the CPU: each compares with what others wrote, or with constants.

Optimizer and schedule are compared step by step with transformers'; a prompt of length 0 with
transformers' plain classifier; adapters with PEFT, and with the released layout computed by hand;
the prompt's order and counts, rates and error lines with constants that can be checked by eye; a
cached prompt with the encoded one; a batch with its sentences one by one; two models in two threads
with each alone; what is fast with what is plain; a run with itself repeated, from Python, and
killed and gone on with, to the last bit; operations with torch's own counts; groups.py with the
paper's numbers.
"""
import ast
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import io
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

# Before anything reads them.  One thread: in models as tiny as these, two would mostly wait.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import groups
import xpe

HERE = Path(__file__).parent
GRID = ["bash", str(HERE / "run_all.sh")]
METHODS = ("spt", "dual", "xpe")
SHORT = "--source eng_Latn --languages eng_Latn,fra_Latn,nqo_Nkoo --steps"
ENGLISH = "--source eng_Latn --languages eng_Latn"
TEXTS = ["topic1 topic2 filler3", "topic11", "filler1 topic21 topic22 foreign3 filler9 topic25"]
WORDS = {
    "a": "topic1 topic2 topic3",
    "b": "topic11 topic12 topic13",
    "c": "topic21 topic22 topic23",
}
SPLITS = ("train", "dev", "test")
HEAD = "base_model.classifier."
LOW, UNSEEN, SEEN, ALL = groups.TARGET_GROUPS
UMASK = os.umask(0)
os.umask(UMASK)


# ---------------------------------------------------------------------------------------- Helpers

@pytest.fixture(scope="session", autouse=True)
def signals_that_count():
    """Tests started with nohup or behind & ignore these, and so would all that they start."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before):
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def call(*parts, toy=True):
    """Exit code of a toy command: texts are split into words, paths and numbers are one word."""
    argv = ["--toy"] if toy else []
    for part in parts:
        argv += part.split() if isinstance(part, str) else [str(part)]
    return xpe.main(argv)


def launch(out, *argv):
    """A toy run from the command line; -> its folder."""
    assert call(*argv, "--out", Path(out)) == 0
    return next(Path(out).iterdir())


def refused(capsys, words, *argv, toy=True):
    """The command ends with exit code 2 and one line on standard error that holds all `words`.

    They are a list, or a text with | between them.  -> the line.
    """
    if isinstance(words, str):
        words = words.split(" | ")
    capsys.readouterr()
    code = call(*argv, toy=toy)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    return error


def lines_of(table):
    """The rows of a table, and of each row the cells between |."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def encoder(name="toy"):
    return xpe.load_backbone(name)[0]


def tokenizer():
    return xpe.load_backbone("toy")[1]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A local --backbone: a tiny XLM-R with a head for 7 labels, saved by transformers."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone = encoder()
    config = transformers.XLMRobertaConfig.from_dict(backbone.config.to_dict() | {"num_labels": 7})
    model = transformers.XLMRobertaForSequenceClassification(config)
    model.roberta.load_state_dict(backbone.state_dict())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """{method: folder of a finished run on the tiny backbone}; each group has a language."""
    codes = "fra_Latn,ita_Latn,pol_Latn,awa_Deva,fao_Latn,nqo_Nkoo,dzo_Tibt"
    argv = f"--source enarzho --languages {codes} --steps 120 --lr 6e-3 --prompt-lr 0.1 --backbone"
    return {method: launch(tmp_path_factory.mktemp(method), argv, tiny, "--method", method)
            for method in METHODS}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of 20 epochs."""
    return launch(tmp_path_factory.mktemp("whole"), SHORT, 100)


def begin(out):
    """A process that makes the same run below another folder."""
    argv = f"--toy {SHORT} 100 --out".split()
    return subprocess.Popen([sys.executable, HERE / "xpe.py", *argv, out], text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def await_checkpoint(folder, process):
    """Wait for a run's first checkpoint, for the end of its process, or for two minutes."""
    until = time.time() + 120
    while not (folder / "checkpoint.pt").exists():
        if process.poll() is not None or time.time() > until:
            return
        time.sleep(0.01)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def result(folder):
    return read_json(folder / "result.json")


def outcome(folder):
    """What must be equal to the last bit in two runs alike: prompt and head, accuracies, curve."""
    adapter = (folder / "adapter/adapter_model.safetensors").read_bytes()
    found = result(folder)
    return adapter, found["accuracy"], found["dev_curve"]


def files(folder):
    """{path: (content, time of last change)} of everything below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def write_tsv(path, rows):
    """Rows (label, text) as SIB-200 has them: CSV with tabs, quoted where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("index_id", "category", "text"))
        for i, row in enumerate(rows):
            writer.writerow((i, *row))


@pytest.fixture
def own(tmp_path):
    """A data folder with languages xx (labels a, b) and yy (b, c), unknown to groups.py."""
    for code, labels in (("xx", "ab"), ("yy", "bc")):
        rows = [(label, WORDS[label]) for label in labels * 4]
        for split in SPLITS:
            write_tsv(tmp_path / f"own/{code}/{split}.tsv", rows)
    return tmp_path / "own"


OF_THE_GRID = "SEEDS STEPS BACKBONE DATA OUT JOBS SLURM_ARRAY_TASK_ID SLURM_SUBMIT_DIR"


def shell(folder, *command, path="", **settings):
    """A process of a command line, in a session of its own, where `python` is this one."""
    outer = dict(os.environ)
    for name in OF_THE_GRID.split():
        outer.pop(name, None)
    folders = [str(path), str(Path(sys.executable).parent), outer["PATH"]]
    outer["PATH"] = os.pathsep.join(folders).lstrip(os.pathsep)
    return subprocess.Popen(command, cwd=folder, env=outer | settings, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def model_of(method="dual", pool="first", labels=7, backbone=None):
    """A model with a random prompt of 6 vectors around the toy's backbone, in eval mode."""
    torch.manual_seed(0)
    prompt = xpe.build_prompt(method, 6, 64, 0.5)
    return xpe.PromptedClassifier(backbone or encoder(), prompt, labels, pool).eval()


def tokens(texts):
    """(ids (B, T), mask (B, T)) of right-padded texts."""
    encoded = tokenizer()(list(texts), padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def logits(model, *texts):
    """Logits (B, C) of ours, or of a model of transformers or PEFT."""
    ids, mask = tokens(texts or TEXTS)
    out = model(input_ids=ids, attention_mask=mask)
    return getattr(out, "logits", out)


def head_by_hand(states, head):
    """Logits (B, C) from what is pooled (B, H) and the {name: tensor} of a head."""
    hidden = torch.tanh(states @ head["dense.weight"].T + head["dense.bias"])              # (B, H)
    return hidden @ head["out_proj.weight"].T + head["out_proj.bias"]                      # (B, C)


def by_hand(backbone, prompt, head, texts=TEXTS, position=0):
    """Logits (B, C) of [prompt | text], one text at a time."""
    pooled = []
    for text in texts:
        ids, _ = tokens([text])
        words = backbone.get_input_embeddings()(ids[0])                                    # (T, H)
        x = torch.cat([prompt, words])[None]                                        # (1, P + T, H)
        pooled.append(backbone(inputs_embeds=x).last_hidden_state[0, position])
    return head_by_hand(torch.stack(pooled), head)


def expected_of(model, texts=TEXTS, position=0):
    return by_hand(model.backbone, model.prompt(), model.head.state_dict(), texts, position)


def close(a, b, tolerance):
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


# ------------------------------------------------------------------------- Optimizer and schedule

SHAPES = ((5, 3), (4,), (2, 3, 4), (1, 6))
PLAIN = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "beta1": None}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("scale", [1.0, 1e-15])    # of gradients: 1e-15 is where eps counts
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_transformers(decay, scale, dtype, tolerance):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
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
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = xpe.Adafactor([p], lr=0.1)

    def closure():
        loss = (p - 1).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert close(p, torch.full((3,), 0.1), 1e-7)


@pytest.mark.parametrize("warmup, total, cycles", [
    (0, 30, 1),
    (3, 30, 2),
    (10, 97, 3),
    (2400, 24_000, 2),
])
def test_schedule_is_transformers(warmup, total, cycles):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = transformers.get_cosine_with_hard_restarts_schedule_with_warmup
    theirs = make(optimizer, warmup, total, cycles).lr_lambdas[0]
    for step in range(total + 3):
        ours = xpe.cosine_with_restarts(step, warmup, total, cycles)
        assert abs(ours - theirs(step)) <= 1e-12, step


# ------------------------------------------------------------------------------------ The prompts

@pytest.mark.parametrize("ratio, encoded", [
    (0.3, 6),
    (0.48, 9),
    (0.7, 14),
    (0.01, 1),
    (0.99, 19),
])
def test_ratio_gives_the_number_of_encoded_vectors(ratio, encoded):
    prompt = xpe.build_prompt("dual", 20, 8, ratio)
    assert prompt.encoded.pseudo_prompt.shape == (encoded, 8)
    assert prompt.standard.vectors.shape == (20 - encoded, 8)
    assert prompt().shape == (20, 8)


def test_a_slip_is_no_soft_prompt():
    pytest.raises(KeyError, xpe.build_prompt, "xep", 20, 8)


@pytest.mark.parametrize("method, rows", [("spt", "1111"), ("dual", "1122"), ("xpe", "2222")])
def test_standard_part_first_encoded_part_second(method, rows):
    prompt = xpe.build_prompt(method, 4, 3, ratio=0.5)
    for name, p in prompt.named_parameters():
        p.data.fill_(0)
        if name.endswith("vectors"):
            p.data.fill_(1)
        if name.endswith("mlp.6.bias"):            # the last Linear gives 0 x + 2
            p.data.fill_(2)
    assert prompt().tolist() == [[int(row)] * 3 for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_each_example_has_a_dropout_mask_of_its_own(method):
    torch.manual_seed(0)
    prompt = xpe.build_prompt(method, 6, 8, 0.5)
    batch = prompt.train()(5)
    assert prompt().shape == (6, 8)
    assert batch.shape == (5, 6, 8)
    own = torch.cdist(batch.flatten(1), batch.flatten(1)) + torch.eye(5) > 1e-3
    assert own.all() == (method != "spt")          # all pairs differ
    finished = prompt.eval()(5)
    assert torch.equal(finished, prompt().expand(5, 6, 8))


def test_encoder_treats_each_vector_alone():
    prompt = xpe.CrossPromptEncoder(5, 8).eval()
    order = [3, 0, 4, 1, 2]
    before = prompt()
    prompt.pseudo_prompt.data = prompt.pseudo_prompt.data[order]
    assert close(prompt(), before[order], 1e-6)
    assert not close(before[order], before, 1e-3)


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


@pytest.mark.parametrize("method, count", [
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
    assert count < 0.003 * plain
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


@pytest.mark.parametrize("pool, position", [("first", 0), ("bos", 6)])
def test_logits_and_gradient_by_hand_whatever_the_padding(pool, position):
    model = model_of(pool=pool)
    found = logits(model)
    expected = expected_of(model, position=position)
    assert close(found, expected, 1e-6)
    assert not close(expected[:1], expected[1:2], 1e-3)
    assert close(logits(model, TEXTS[1]), expected[1:2], 1e-6)
    for p in model.prompt.parameters():
        a, = torch.autograd.grad(found.square().sum(), p, retain_graph=True)
        b, = torch.autograd.grad(expected.square().sum(), p, retain_graph=True)
        largest = b.abs().max().item()
        assert largest > 0
        assert close(a, b, 1e-5 * largest)


@pytest.mark.parametrize("method", METHODS)
def test_cached_prompt_gives_the_same_and_needs_no_encoder(method):
    model = model_of(method)
    before = logits(model)
    assert torch.equal(before, logits(model.cache_prompt()))
    assert [p.shape for p in model.prompt.parameters()] == [(6, 64)]


def toy_sentences(*codes):
    """The toy's test sentences, tokenized."""
    examples = xpe.load_examples("toy", codes, "test")
    return xpe.tokenize(examples, groups.LABELS, tokenizer(), "cpu", 32)


def test_two_models_share_a_backbone_in_two_threads():
    backbone = encoder()
    models = [model_of(pool=pool, backbone=backbone) for pool in ("first", "bos")]
    ids, mask = tokens(TEXTS)
    sentences = toy_sentences("eng_Latn")

    def both(model):
        with torch.no_grad():
            return torch.cat([model(ids, mask), xpe.predict(model, sentences)])

    alone = [both(model) for model in models]
    assert not close(*alone, 1e-3)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(both, models[i % 2]) for i in range(200)]
        found = [call.result() for call in calls]
    wrong = [i for i, one in enumerate(found) if not close(one, alone[i % 2], 1e-6)]
    assert wrong == []


@pytest.mark.parametrize("pool", xpe.POOLS)
def test_fast_changes_no_result_and_registers_nothing(pool, monkeypatch):
    model = model_of(pool=pool)
    ids, mask = tokens(TEXTS)
    hooked = []
    forward = model.backbone.forward

    def spy(**inputs):
        for module in model.modules():
            hooked.extend([*module._forward_hooks, *module._forward_pre_hooks])
        return forward(**inputs)

    def results(context):
        with context:
            found = model(ids, mask)
        loss = xpe.loss_of(found, torch.arange(3))
        return found, *torch.autograd.grad(loss, parameters)

    monkeypatch.setattr(model.backbone, "forward", spy)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fast = results(xpe.fast(model))
    plain = results(torch.enable_grad())
    for a, b in zip(fast, plain, strict=True):
        assert close(a, b, 1e-6)
    assert hooked == []


# ------------------------------------------------------------------------------- Loss and training

EPOCHS = [  # step of 16, dev loss, dev accuracy -> the epoch that is kept, epochs waited for
    (4, 0.9, 50, 0, 0),
    (6, 0.95, 50, 0, 0),
    (8, 0.5, 75, 2, 0),
    (10, 0.7, 75, 2, 1),
    (12, 0.6, 50, 2, 2),
    (14, 0.4, 100, 5, 0),
    (15, 0.6, 100, 5, 1),
]


def test_best_epoch_is_kept_and_patience_counts_from_half_time():
    model = model_of("spt")
    progress = xpe.Progress()
    for epoch, (step, loss, accuracy, kept, waited) in enumerate(EPOCHS):
        progress.step = step
        model.prompt.vectors.data.fill_(epoch)
        progress.record({"step": step, "dev_loss": loss, "dev_accuracy": accuracy}, model)
        ended = [progress.finished(xpe.Config(steps=16, patience=n)) for n in range(1, 5)]
        assert progress.best["prompt.vectors"][0, 0].item() == kept
        assert sum(ended) == waited
        assert progress.finished(xpe.Config(steps=step))


@pytest.mark.parametrize("losses, stop", [
    ([20 - n for n in range(20)] + [5] * 200, 98),     # overfits: the worse half counts alone
    ([1] * 200, 98),
    ([20 - n for n in range(20)] + [5 - n / 99 for n in range(150)], None),
    ([1] * 90 + [0.5] + [0.5] * 100, 111),                     # an equal loss is no better one
])
def test_early_stopping_begins_afresh_at_half_time(losses, stop):
    """24,000 steps in epochs of 154, patience 20; what transformers' callback, kept silent before
    step 12,000, does with these losses was computed with the authors' program."""
    progress = xpe.Progress()
    cfg = xpe.Config()
    for epoch, loss in enumerate(losses, 1):
        progress.step = min(154 * epoch, cfg.steps)
        progress.curve.append({"step": progress.step, "dev_loss": loss})
        if progress.finished(cfg):
            break
    assert epoch == (stop or 156)                              # 156 epochs are all 24,000 steps


def test_patience_ends_a_run(tmp_path):
    folder = launch(tmp_path, ENGLISH, "--steps 400 --lr 0.3 --patience 1")
    *before, last = result(folder)["dev_curve"]
    assert 200 <= last["step"] < 400
    assert last["dev_loss"] >= min(epoch["dev_loss"] for epoch in before)


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


def test_backbone_stays_frozen(tmp_path, trained):
    launch(tmp_path, SHORT, 10)
    model, before, _, _ = trained[0]
    for name, p in model.backbone.named_parameters(prefix="backbone"):
        assert p.grad is None
        assert p.detach().numpy().tobytes() == before[name].numpy().tobytes(), name
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


@pytest.mark.parametrize("recipe, method, table", [
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_dropout_is_dropout(dtype):
    x = torch.full((1001, 301), 3.0, dtype=dtype, requires_grad=True)      # 1 more than 4 x 75,325
    with xpe.fast(model_of()):
        y = torch.nn.Dropout(0.2)(x)
        assert torch.nn.Dropout(0.2).eval()(x) is x
        assert torch.nn.functional.dropout(x, p=0.0) is x
    y.sum().backward()
    kept = y != 0
    assert set(y.unique().tolist()) == {0.0, (x[0, 0] / 0.8).item()}
    assert torch.equal(x.grad, kept.to(dtype) * 1.25)

    lanes = kept.flatten()[:-1].view(-1, 4).double()                                   # (75325, 4)
    correlation = torch.corrcoef(lanes.T) - torch.eye(4)
    assert (lanes.mean(0) - 0.8).abs().max() < 0.006           # their deviation is 0.0015
    assert correlation.abs().max() < 0.015                     # and here 0.0036


@pytest.mark.parametrize("dropout, expected", [("on", {0.0, 0.1}), ("off", {0.0})])
def test_backbones_dropout_is_fast_and_can_be_off(dropout, expected, tmp_path, monkeypatch):
    rates = set()
    draw = xpe.fast_dropout

    def spy(x, p=0.5, training=True, inplace=False):
        rates.add(p * training)
        return draw(x, p, training)

    monkeypatch.setattr(xpe, "fast_dropout", spy)
    argv = "--method spt --head-dropout 0 --backbone-dropout"
    launch(tmp_path, SHORT, 1, argv, dropout)
    assert rates == expected


@pytest.mark.parametrize("argv, there, expected", [
    ("", True, ("cuda:0", "bf16")),
    ("", False, ("cpu", "fp32")),
    ("--device cpu", True, ("cpu", "fp32")),
    ("--dtype fp32", True, ("cuda:0", "fp32")),
    ("--method full", True, ("cuda:0", "fp32")),
])
def test_auto_is_a_gpu_in_bf16_where_there_is_one(argv, there, expected, monkeypatch):
    class Probe:                                   # what torch.zeros gives on a machine with a GPU
        def __init__(self, size, device):
            self.device = {"cuda": "cuda:0"}.get(device, device)

        def item(self):
            return 0.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "zeros", Probe)
    cfg = xpe.parse(argv.split())
    assert (cfg.device, cfg.dtype) == expected


def test_epoch_batches_cover_every_sentence_once():
    lengths = np.random.default_rng(0).integers(5, 60, size=1001)

    def batches(epoch):
        return [list(indices) for indices in xpe.epoch_batches(lengths, 32, 0, epoch)]

    first = batches(0)
    assert first == batches(0)
    assert first != batches(1)
    for epoch in (0, 1):
        assert sorted(sum(batches(epoch), [])) == list(range(1001))
    assert sorted(map(len, first)) == [9] + [32] * 31
    spread = [max(lengths[indices]) - min(lengths[indices]) for indices in first]
    assert fmean(spread) < 20                      # of 54; unsorted: 51


def test_predictions_keep_the_order_and_equal_one_by_one(monkeypatch):
    small = functools.partial(xpe.evaluation_batches, positions=200)
    monkeypatch.setattr(xpe, "evaluation_batches", small)
    model = model_of()
    codes = ["eng_Latn", "nqo_Nkoo"]
    examples = xpe.load_examples("toy", codes, "test")
    sentences = toy_sentences(*codes)
    expected = expected_of(model, [example.text for example in examples])
    assert close(xpe.predict(model, sentences), expected, 1e-6)

    accuracy, loss, predicted = xpe.evaluate(model, sentences)
    classes = expected.argmax(1).tolist()
    right = [groups.LABELS[i] == example.label for i, example in zip(classes, examples)]
    shares = [100 * fmean(right[:35]), 100 * fmean(right[35:])]
    assert list(predicted) == classes
    assert accuracy == pytest.approx(dict(zip(codes, shares)))
    assert loss == pytest.approx(xpe.loss_of(expected, sentences.classes).item(), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_toy_learns_what_the_backbone_knows(runs, method):
    found = result(runs[method])["groups"]
    assert found[SEEN] >= 80
    assert found[SEEN] > found[UNSEEN] > found[LOW]


RESULT = "config digests labels versions seconds trainable_parameters dev_accuracy groups".split()


@pytest.mark.parametrize("method", METHODS)
def test_result_and_log_are_whole(runs, method):
    found = result(runs[method])
    curve = found["dev_curve"]
    log = (runs[method] / "log.csv").read_text()
    assert set(RESULT) < found.keys()
    assert found["labels"] == list(groups.LABELS)
    assert len(found["accuracy"]) == 7
    assert curve[-1]["step"] == 120
    assert len(log.splitlines()) == 1 + len(curve)
    for epoch in curve:                            # the last step's, with warm-up in the first 12
        factor = xpe.cosine_with_restarts(epoch["step"] - 1, 12, 120)
        assert epoch["lr"] == pytest.approx(6e-3 * factor)


@pytest.mark.parametrize("method", METHODS)
def test_predictions_give_the_accuracy(runs, method):
    with open(runs[method] / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for code, percent in result(runs[method])["accuracy"].items():
        here = [row for row in rows if row["language"] == code]
        _, labels = xpe.load_language("toy", code, "test")
        right = [row["label"] == row["predicted"] for row in here]
        assert [row["label"] for row in here] == labels
        assert [int(row["row"]) for row in here] == list(range(35))
        assert percent == pytest.approx(100 * fmean(right))
    assert len(rows) == 7 * 35


# ---------------------------------------------------------------- Repeated, stopped, gone on with

@pytest.mark.parametrize("steps", [0, 15])         # 0: the seed decides the start, too
def test_one_seed_twice_is_bit_identical(steps, tmp_path):
    argv = SHORT, steps, "--seed"
    first = outcome(launch(tmp_path / "a", *argv, 3))
    again = outcome(launch(tmp_path / "b", *argv, 3))
    other = outcome(launch(tmp_path / "c", *argv, 4))
    assert first == again
    assert first[0] != other[0]


def contents(folder):
    """{name: content} of a run's files; the seconds of training are left out."""
    found = {path.relative_to(folder): content for path, (content, _) in files(folder).items()}
    del found[Path("checkpoint.pt")]
    found[Path("result.json")] = result(folder) | {"seconds": 0}
    return found


def test_python_gives_what_the_command_line_gives(tmp_path):
    folder = launch(tmp_path / "a", "--method spt", SHORT, 10)
    codes = "eng_Latn,fra_Latn,nqo_Nkoo"
    cfg = xpe.Config(method="spt", toy=True, source="eng_Latn", languages=codes, steps=10,
                     out=str(tmp_path / "b"))
    found = xpe.run(cfg)
    other = tmp_path / "b" / folder.name
    assert found == result(other)
    assert contents(folder) == contents(other)


@pytest.mark.parametrize("number, code", [
    (signal.SIGKILL, -9),
    (signal.SIGTERM, 143),
    (signal.SIGINT, 130),
])
def test_interrupted_run_ends_as_if_it_never_was(number, code, whole, tmp_path):
    folder = tmp_path / whole.name
    process = begin(tmp_path)
    await_checkpoint(folder, process)
    process.send_signal(number)
    _, error = process.communicate()
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / "result.json").exists()
    assert outcome(launch(tmp_path, SHORT, 100)) == outcome(whole)
    assert process.returncode == code
    assert "Traceback" not in error
    assert error.count("\n") == (0 if number == signal.SIGKILL else 1)


def test_finished_run_is_reported_not_repeated(whole, capsys):
    before = files(whole)
    launch(whole.parent, SHORT, 100)
    out = capsys.readouterr().out
    assert "fra_Latn" in out
    assert "synthetic" in out
    assert files(whole) == before


def test_finished_is_told(tmp_path):
    argv = f"--toy {SHORT} 0 --target kab_Latn --target-steps 0 --out".split() + [str(tmp_path)]
    cfg = xpe.parse(argv)
    source = dataclasses.replace(cfg, target="")
    assert not xpe.finished(source)
    xpe.run(source)
    assert xpe.finished(source)
    assert not xpe.finished(cfg)
    xpe.transfer(cfg)
    assert xpe.finished(cfg)
    assert not xpe.finished(dataclasses.replace(cfg, batch_size=7))


def test_folder_of_another_config_is_refused(whole, capsys):
    before = files(whole)
    other = SHORT, 99, "--batch-size 7 --out", whole.parent
    error = refused(capsys, "100 there, 99 here", *other)
    assert re.findall(r"(\w+) \(", error) == ["steps", "batch_size"]
    assert files(whole) == before


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {"method": "spt"}, "accuracy": {}}'])
def test_result_of_another_program_is_refused(text, tmp_path, capsys):
    path = tmp_path / "toy-dual70-eng_Latn-s0/result.json"
    path.parent.mkdir()
    path.write_text(text)
    before = files(tmp_path)
    refused(capsys, [str(path.parent)], SHORT, 100, "--out", tmp_path)
    assert files(tmp_path) == before


def test_a_second_process_is_told_and_the_first_goes_on(whole, tmp_path, capsys):
    process = begin(tmp_path)
    await_checkpoint(tmp_path / whole.name, process)
    process.send_signal(signal.SIGSTOP)            # so that it cannot end before the second comes
    before = files(tmp_path)
    refused(capsys, "another process", SHORT, 100, "--out", tmp_path)
    assert files(tmp_path) == before
    process.send_signal(signal.SIGCONT)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert outcome(tmp_path / whole.name) == outcome(whole)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("end", ["finished", "interrupted"])
def test_changed_data_are_refused(end, split, own, tmp_path, capsys):
    argv = "--source xx --languages xx --steps 4 --data", own
    folder = launch(tmp_path / "out", *argv)
    if end == "interrupted":
        (folder / "result.json").unlink()
    before = files(folder)
    write_tsv(own / f"xx/{split}.tsv", [("b", WORDS["b"]), ("a", WORDS["a"])])
    refused(capsys, [folder.name, "sentences"], *argv, "--out", tmp_path / "out")
    assert files(folder) == before


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_full_disk_is_one_line_and_keeps_the_checkpoint(name, whole, tmp_path, monkeypatch, capsys):
    real = getattr(os, name)
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 2:                         # the first epoch's checkpoint.pt and log.csv
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, name, full)
    assert call(SHORT, 100, "--out", tmp_path) == 1
    error = capsys.readouterr().err
    monkeypatch.undo()
    assert error.count("\n") == 1
    assert "No space left" in error
    assert list(tmp_path.rglob("*.new")) == []
    assert kept(tmp_path / whole.name)["progress"]["step"] == 5
    assert outcome(launch(tmp_path, SHORT, 100)) == outcome(whole)


def kept(folder):
    """What a checkpoint holds."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


class Hostile:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return open, (os.environ["HOSTILE"], "w")


@pytest.mark.parametrize("content", ["cut", "foreign", "hostile", "other model"])
def test_unreadable_checkpoint_is_refused(content, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    path = tmp_path / whole.name / "checkpoint.pt"
    path.parent.mkdir()
    contents = {
        "cut": kept(whole),
        "foreign": {"weights": 1},
        "hostile": Hostile(),
        "other model": kept(whole) | {"model": {"a": torch.zeros(1)}},
    }
    torch.save(contents[content], path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    before = files(tmp_path)
    refused(capsys, "checkpoint.pt", SHORT, 100, "--out", tmp_path)
    assert files(tmp_path) == before


def test_non_finite_loss_names_step_and_languages(own, tmp_path, monkeypatch, capsys):
    real = torch.nn.functional.cross_entropy
    evaluated = []

    def poisoned(output, classes, **_):            # from epoch 2 on, for label a: that is xx alone
        if len(classes) > 1:
            evaluated.append(True)
        bad = evaluated and classes.tolist() == [0]
        return real(output, classes) * (float("nan") if bad else 1.0)

    argv = "--source xx,yy --batch-size 1 --steps 40 --data", own          # an epoch is 16
    out = tmp_path / "out"
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", poisoned)
    assert call(*argv, "--out", out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert 17 <= int(re.search(r"step (\d+)", error)[1]) <= 32
    assert re.search(r"\bxx\b", error)
    assert not re.search(r"\byy\b", error)

    checkpoint = kept(next(out.iterdir()))
    assert checkpoint["progress"]["step"] == 16
    for tensor in checkpoint["model"].values():
        assert tensor.isfinite().all()
    monkeypatch.undo()
    assert result(launch(out, *argv))["dev_curve"][-1]["step"] == 40


def test_non_finite_dev_loss_keeps_the_checkpoint(tmp_path, capsys):
    rates = "--lr 1e12 --weight-decay 1e12 --warmup 0"         # one step breaks the weights
    assert call(SHORT, 4, "--batch-size 1000", rates, "--out", tmp_path) == 1
    assert "dev loss" in capsys.readouterr().err
    assert list(tmp_path.glob("*/checkpoint.pt")) == []


def test_start_is_not_broadcast(tmp_path, capsys):
    argv = SHORT, 0, "--method spt --prompt-length"
    start = launch(tmp_path / "a", *argv, 1)
    other = *argv, 20, "--out", tmp_path / "b", "--init-from", start
    refused(capsys, "does not fit", *other)


# ------------------------------------------------------------------ Sequential transfer, baseline

LAO_KABYLE = "--target lao_Laoo,kab_Latn --languages lao_Laoo,kab_Latn --target-steps 0"


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    """A folder with a: a source run and two targets, b: the targets from that source run."""
    folder = tmp_path_factory.mktemp("transferred")
    argv = SHORT, 60, LAO_KABYLE, "--out"
    assert call(*argv, folder / "a") == 0
    start = folder / "a/toy-dual70-eng_Latn-s0"
    assert call(*argv, folder / "b", "--init-from", start) == 0
    return folder


@pytest.mark.parametrize("out, count", [("a", 3), ("b", 2)])   # b: no second source run
def test_target_starts_where_the_source_run_ended(out, count, transferred):
    assert len(list((transferred / out).iterdir())) == count
    accuracy = result(transferred / "a/toy-dual70-eng_Latn-s0")["accuracy"]
    for code in ("lao_Laoo", "kab_Latn"):
        target = result(transferred / out / f"toy-dual70-eng_Latn-{code}-s0")
        settings = {"steps": 0, "warmup": 0.05, "dropout": 0.0, "patience": 30, "target": code}
        assert target["accuracy"] == {code: accuracy[code]}
        assert settings.items() <= target["config"].items()
    assert accuracy["lao_Laoo"] > accuracy["kab_Latn"]


def test_runs_are_the_same_by_other_paths_and_when_moved(transferred, monkeypatch):
    before = files(transferred)
    monkeypatch.chdir(transferred)
    argv = SHORT, 60, LAO_KABYLE, "--out"
    assert call(*argv, "./b/ --init-from a/toy-dual70-eng_Latn-s0/") == 0
    Path("a").rename("moved")
    assert call(*argv, "moved") == 0
    Path("moved").rename("a")
    assert files(transferred) == before


def test_target_keeps_the_labels_of_its_source(own, tmp_path, capsys):
    argv = "--source xx --target yy --steps 20 --target-steps 0 --data", own
    first = *argv, "--languages xx --out", tmp_path / "first"
    refused(capsys, "yy/train.tsv:3 | 'c'", *first)         # its rows are b, c, b, ...
    for split in SPLITS:
        write_tsv(own / f"yy/{split}.tsv", [("b", WORDS["b"])] * 4)        # no a
    again = tmp_path / "again"
    assert call(*argv, "--languages xx,yy --out", again) == 0
    target = again / "toy-dual70-xx-yy-s0"
    accuracy = result(again / "toy-dual70-xx-s0")["accuracy"]
    assert result(target)["accuracy"] == {"yy": accuracy["yy"]}
    assert read_json(target / "adapter/xpe.json")["labels"] == ["a", "b"]


def test_a_target_without_a_start_is_refused(tmp_path):
    """Else it would train with the source's steps, and count as a transfer."""
    cfg = xpe.Config(toy=True, source="eng_Latn", target="kab_Latn", out=str(tmp_path))
    with pytest.raises(xpe.InputError, match="init_from"):
        xpe.run(cfg)
    assert not list(tmp_path.iterdir())


def test_adapter_of_other_languages_starts_no_transfer(tmp_path, capsys):
    start = launch(tmp_path / "a", "--method spt", SHORT, 0) / "adapter"
    argv = "--method spt --steps 0 --target-steps 0 --target kab_Latn --init-from", start
    refused(capsys, "trained with --source eng_Latn", *argv, "--out", tmp_path / "b")
    assert call(*argv, "--source eng_Latn --out", tmp_path / "c") == 0
    (start / "xpe.json").unlink()                  # as PEFT leaves one: nobody knows its languages
    labels = ",".join(groups.LABELS)
    assert call(*argv, "--labels", labels, "--out", tmp_path / "b") == 0


def test_init_from_a_run_that_does_not_fit_is_refused(tmp_path, capsys):
    folder = launch(tmp_path, SHORT, 1)
    argv = "--target kab_Latn --init-from", folder, "--out", tmp_path / "b"
    bos = *argv, "--source eng_Latn --pool bos"
    unfinished = *argv, "--source eng_Latn"
    refused(capsys, "--init-from | --source eng_Latn", *argv)
    refused(capsys, "--init-from | --pool first", *bos)
    (folder / "result.json").unlink()
    refused(capsys, "--init-from | must be finished", *unfinished)
    assert not (tmp_path / "b").exists()


def test_target_learns_from_its_own_sentences_alone(tmp_path, trained):
    targets = ["awa_Deva", "kab_Latn"]
    assert call(SHORT, 20, "--target", ",".join(targets), "--out", tmp_path) == 0
    used = [[set(sentences.languages), set(dev.languages)] for _, _, sentences, dev in trained]
    assert used == [[{code}, {code}] for code in ["eng_Latn", *targets]]
    names = ["eng_Latn", *[f"eng_Latn-{code}" for code in targets]]
    outcomes = [outcome(tmp_path / f"toy-dual70-{name}-s0") for name in names]
    assert len({adapter for adapter, _, _ in outcomes}) == 3
    for _, _, curve in outcomes[1:]:
        assert curve[-1]["step"] == 75             # the toy's --target-steps


def test_full_fine_tuning_trains_the_backbone_and_no_prompt(tmp_path, trained):
    folder = launch(tmp_path, "--method full", SHORT, 30, "--lr 1e-3")
    model = trained[0][0]
    start = dict(encoder().named_parameters())
    moved = [name for name, p in model.backbone.named_parameters()
             if not torch.equal(p, start[name])]
    assert moved == list(start)
    assert len(model.prompt()) == 0
    assert result(folder)["trainable_parameters"] == size_of(model.parameters())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["log.csv", "predictions.csv", "result.json"]


# --------------------------------------------------------------------------- One change, one place

def falls(folder):
    """Does the dev loss fall in a run?"""
    curve = result(folder)["dev_curve"]
    return curve[-1]["dev_loss"] < 0.9 * curve[0]["dev_loss"]


class LowRankPrompt(torch.nn.Module):
    """Another prompt method: P vectors of rank 4."""

    def __init__(self, length, hidden):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.randn(length, 4))
        self.columns = torch.nn.Parameter(torch.randn(4, hidden))

    def forward(self, *batch):
        vectors = self.rows @ self.columns                                                 # (P, H)
        return vectors.expand(*batch, -1, -1)


def test_another_prompt_is_one_change(tmp_path, monkeypatch, trained):
    def build_prompt(method, length, hidden, ratio, **encoder):
        return LowRankPrompt(length, hidden)

    monkeypatch.setattr(xpe, "build_prompt", build_prompt)
    folder = launch(tmp_path, SHORT, 60)
    rows = trained[0][1]["prompt.rows"]
    assert kept(folder)["progress"]["best"].keys() > {"prompt.rows", "prompt.columns"}
    assert not torch.equal(kept(folder)["model"]["prompt.rows"], rows)
    assert falls(folder)


def test_another_pooling_is_one_change(tmp_path, monkeypatch):
    def mean_of_text(states, mask, P):
        weights = mask[:, P:, None]                                                     # (B, T, 1)
        return (states[:, P:] * weights).sum(dim=1) / weights.sum(dim=1)                   # (B, H)

    monkeypatch.setitem(xpe.POOLS, "mean", mean_of_text)
    folder = launch(tmp_path, SHORT, 60, "--pool mean")
    assert falls(folder)


def test_another_loss_is_one_change(tmp_path, monkeypatch):
    def smoothed(logits, classes):
        return torch.nn.functional.cross_entropy(logits, classes, label_smoothing=0.2)

    model = model_of()
    sentences = toy_sentences("eng_Latn")
    expected = smoothed(xpe.predict(model, sentences), sentences.classes).item()
    optimizer = xpe.Adafactor(model.head.parameters(), lr=0.0)
    monkeypatch.setattr(xpe, "loss_of", smoothed)
    _, evaluated, _ = xpe.evaluate(model, sentences)
    stepped = xpe.train_step(model, sentences.batch(np.arange(35)), optimizer, 1.0)
    assert evaluated == pytest.approx(expected)
    assert stepped.item() == pytest.approx(expected, rel=1e-5)
    assert falls(launch(tmp_path, SHORT, 60))


# --------------------------------------------------------------------------------------- Settings

def flag(name):
    return "--" + name.replace("_", "-")


def out_of_bounds():
    """(setting, value): one below, one above for numbers, and a choice that there is not."""
    for field in dataclasses.fields(xpe.Config):
        facts = field.metadata
        if facts["choices"]:
            yield field.name, "none"
        elif field.type in (int, float):
            yield field.name, facts["least"] - 1
            yield field.name, facts["below"]
            yield field.name, math.nan


@pytest.mark.parametrize("name, value", list(out_of_bounds()))
def test_a_value_out_of_bounds_is_refused(name, value):
    with pytest.raises(xpe.InputError) as info:
        xpe.Config(**{name: value})
    assert str(info.value).startswith(flag(name))
    assert "\n" not in str(info.value)


SAID = """
--method spt --prompt-length 1
--method full --prompt-length 0 --dtype fp32 --xpe-ratio 0
--method xpe --xpe-ratio 1
--xpe-ratio 0.3 --prompt-length 2 --mlp-hidden 7 --dropout 0.25 --head-dropout 0 --pool bos
--backbone FacebookAI/xlm-roberta-large --data Davlan/sib200 --max-length 164
--source seen --languages kab_Latn --target full --init-from here --out there
--steps 24000 --lr 5e-5 --prompt-lr 5e-3 --target-steps 6000 --target kab_Latn
--steps 0 --lr 0 --prompt-lr 0 --target-steps 0 --target kab_Latn
--clip 1e-3 --warmup 0 --weight-decay 0
--batch-size 3 --cycles 1 --patience 1 --seed 5 --recipe released --weight-decay 0.1
--target-warmup 0.5 --target-dropout 0.5 --target-patience 1 --target kab_Latn
--backbone-dropout off
--device cpu --dtype bf16 --load there --predict -
"""


@pytest.mark.parametrize("toy", ["", "--toy"])
@pytest.mark.parametrize("argv", SAID.strip().splitlines())
def test_nothing_that_was_said_is_changed(argv, toy):
    words = argv.split()
    said = dict(zip(words[::2], words[1::2]))
    cfg = xpe.parse([*words, *toy.split()])
    for field in dataclasses.fields(xpe.Config):
        if flag(field.name) in said:
            value = field.type(said.pop(flag(field.name)))
            assert getattr(cfg, field.name) == value
    assert said == {}


# -------------------------------------------------------------------------------------- Bad input

BAD_INPUT = """
--source eng_Lat                                | 'eng_Lat' | eng_Latn
--source joshi                                  | 'joshi' | joshi5
--source eng_Latn --languages fra_Latn,french   | 'french'
--method dul                                    | 'dul' | dual
--xpe-ratio 0                                   | --xpe-ratio
--xpe-ratio 1                                   | --xpe-ratio
--xpe-ratio 1.5                                 | --xpe-ratio
--method spt --xpe-ratio 0.5                    | --xpe-ratio | spt
--prompt-length 1                               | --prompt-length | 2
--prompt-length 100                             | 100 | 128 positions
--steps -1                                      | --steps -1
--steps many                                    | --steps | 'many'
--seed 9999999999999999999999                   | --seed
--lr nan                                        | --lr nan
--batch-size 0                                  | --batch-size 0
--colour red                                    | --colour
--predict {tmp}/file                            | --predict | --load
--target swh_Lat                                | 'swh_Lat' | swh_Latn
--target swh_Latn --method full                 | --target | --method full
--target-steps -1                               | --target-steps -1
--device cuda:77                                | cuda:77
--device abacus                                 | abacus
--backbone {tmp}/none                           | none | --backbone DIR | --toy
--backbone nobody/nothing                       | nobody/nothing | --backbone DIR | --toy
--data {tmp}/none                               | none | no such folder
--data {tmp}/empty                              | empty
--data nobody/nothing                           | nobody/nothing | --data DIR
--out {tmp}/file/below                          | file
--load {tmp}/none                               | none
--init-from {tmp}/none                          | none
--method full --dtype bf16                      | --method full | bf16
--method full --prompt-length 5                 | --method full | --prompt-length
--method full --target kab_Latn                 | --method full | --target
--method full --xpe-ratio 0.5                   | --xpe-ratio | full
--method xpe --xpe-ratio 0.5                    | --xpe-ratio | xpe
"""


@pytest.mark.parametrize("row", lines_of(BAD_INPUT))
def test_bad_input_is_one_line_and_leaves_nothing(row, tmp_path, capsys):
    argv, *words = row
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, words, "--out", tmp_path / "out", argv.format(tmp=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


BAD_DATA = r"""
xx/dev.tsv   | category\ttext\na\tone\nd\ttwo\n                     | xx/dev.tsv:3 | 'd' | a, b
xx/dev.tsv   | category\ttext\na\t"one\ntwo ""three""\x22\nd\ttwo\n | xx/dev.tsv:4 | 'd'
yy/test.tsv  | category\ttext\nb\tone\nb\t \nb\ttwo\n               | yy/test.tsv:3 | empty text
xx/train.tsv | category\ttext\na\tone\n\ttwo\n                      | xx/train.tsv:3 | label
xx/train.tsv | category\ttext\n                                     | no train rows | xx
xx/train.tsv | a,b\n1,2\n                                           | xx/train.tsv | text
xx/train.tsv | category\ttext\na\t"A quote, open\nb\ttwo\n          | xx/train.tsv | end of data
xx/train.tsv | index_id\tcategory\ttext\n0\ta\t\xff\xfe\n           | xx/train.tsv
xx/train.tsv | index_id\tcategory\ttext\n0\ta\n                     | xx/train.tsv:2 | empty text
xx/dev.tsv   |                                                      | xx/dev.tsv
yy/test.tsv  |                                                      | yy/test.tsv
"""


@pytest.mark.parametrize("row", lines_of(BAD_DATA))
def test_bad_data_names_file_and_line(row, own, tmp_path, capsys):
    name, content, *words = row
    (own / name).unlink()
    if content:
        content = content.encode().decode("unicode_escape")
        (own / name).write_bytes(content.encode("latin-1"))
    out = tmp_path / "out"
    refused(capsys, words, "--data", own, "--source xx --steps 1 --out", out)
    assert not out.exists()


# ------------------------------------------------------------------------------------------- Data

def test_quoted_fields_are_read_whole(own):
    rows = [("a", 'he said "a\tb"'), ("b", "two\nlines"), ("a", "plain")]
    write_tsv(own / "xx/dev.tsv", rows)
    texts, labels = xpe.load_language(str(own), "xx", "dev")
    assert list(zip(labels, texts)) == rows


def test_byte_order_mark_is_not_data(own):
    (own / "xx/dev.tsv").write_text("\ufeffcategory\ttext\na\tone\n", encoding="utf-8")
    (own / "lines").write_text("\ufeffone\ntwo\n", encoding="utf-8")
    assert xpe.load_language(str(own), "xx", "dev") == (["one"], ["a"])
    assert list(xpe.read_lines(own / "lines")) == [["one", "two"]]
    assert list(xpe.read_lines(own / "lines", size=1)) == [["one"], ["two"]]


def test_a_source_may_mix_names_and_codes():
    codes = xpe.available_codes("toy")
    found = groups.resolve("joshi5, kab_Latn,eng_Latn", codes, "toy")
    assert found == [*groups.JOSHI5, "kab_Latn"]


def test_own_languages_and_labels(own, tmp_path):
    argv = "--source xx,yy --steps 80 --lr 1e-2 --prompt-lr 0.1 --data", own
    folder = launch(tmp_path / "out", *argv)
    assert result(folder)["groups"] == {}
    assert result(folder)["accuracy"] == {"xx": 100.0, "yy": 100.0}
    assert read_json(folder / "adapter/xpe.json")["labels"] == ["a", "b", "c"]


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


def write_hub(folder):
    """Two of the toy's languages as a data set of the hub, which says validation for dev."""
    front = "---\nconfigs:"
    for code in ("eng_Latn", "fra_Latn"):
        front += HUB_LANGUAGE.format(code=code)
        for split in SPLITS:
            texts, labels = xpe.load_language("toy", code, split)
            write_tsv(folder / f"data/{code}/{split}.tsv", zip(labels, texts))
    (folder / "README.md").write_text(front + "\n---\n")


def test_data_set_in_the_hubs_format(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "hub"
    write_hub(data)
    dev = xpe.load_language("toy", "eng_Latn", "dev")
    assert xpe.load_language(str(data), "eng_Latn", "dev") == dev
    argv = "--source eng_Latn --steps 5"           # all languages here are two
    toy = launch(tmp_path / "toy", argv, "--languages eng_Latn,fra_Latn")
    assert outcome(launch(tmp_path / "out", argv, "--data", data)) == outcome(toy)


# --------------------------------------------------------------------------------------- Adapters

def adapter(folder, tensors, **config):
    """A hand-made adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"task_type": "SEQ_CLS", "base_model_name_or_path": "toy"} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load(folder, name="toy"):
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


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_our_adapter(runs, tiny, method):
    peft = pytest.importorskip("peft")
    folder = runs[method] / "adapter"
    theirs = logits(peft.PeftModel.from_pretrained(plain_classifier(tiny), str(folder)).eval())
    assert close(logits(load(folder, tiny)), theirs, 1e-5)
    assert theirs.std() > 1                        # a random head would give 0.1
    facts = read_json(folder / "xpe.json")
    assert facts["labels"] == list(groups.LABELS)
    assert sorted(facts["languages"]) == groups.ENARZHO


def test_we_load_pefts_adapter(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    theirs = peft.get_peft_model(plain_classifier(tiny), config).eval()
    theirs.save_pretrained(tmp_path)
    assert close(logits(load(tmp_path, tiny)), logits(theirs), 1e-5)


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


def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = model_of("xpe", labels=3)
    xpe.save_adapter(model, tmp_path, base="somewhere", facts={"labels": ["x"]})
    assert close(logits(load(tmp_path)), logits(model.eval()), 1e-6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wanted = {HEAD + name: tensor for name, tensor in model.head.state_dict().items()}
    wanted["prompt_embeddings"] = model.prompt()
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, wanted[name])
    assert read_json(tmp_path / "adapter_config.json") == SAVED
    assert read_json(tmp_path / "xpe.json") == {"labels": ["x"]}


def test_saving_leaves_the_dropout_on(tmp_path):
    model = model_of("xpe").train()
    model.backbone.eval()
    before = [module.training for module in model.modules()]
    xpe.save_adapter(model, tmp_path)
    assert [module.training for module in model.modules()] == before


def test_adapter_of_a_backbone_of_another_name_is_noted(tiny, tmp_path, capsys):
    xpe.save_adapter(model_of(), tmp_path, base="some/other")
    load(tmp_path, tiny)
    assert f"{tmp_path} was made for some/other, and is used with {tiny}" in capsys.readouterr().err
    xpe.save_adapter(model_of(), tmp_path, base=str(tiny))
    load(tmp_path, tiny)
    assert capsys.readouterr().err == ""


def test_pool_bos_is_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="bos"):
        xpe.save_adapter(model_of(pool="bos"), tmp_path)


def random_encoder(encoded):
    """{name: tensor} of a pseudo prompt and its MLP as released, and what they give (P, H)."""
    x = torch.randn(encoded, 64)
    tensors = {"prompt_encoder.xpe_embedding.weight": x}
    for place, wide, narrow in ((0, 16, 64), (3, 16, 16), (6, 64, 16)):
        weight = torch.randn(wide, narrow) / narrow ** 0.5
        bias = torch.randn(wide)
        tensors[f"prompt_encoder.xpe_head.{place}.weight"] = weight
        tensors[f"prompt_encoder.xpe_head.{place}.bias"] = bias
        x = x @ weight.T + bias
        if place < 6:
            x = torch.relu(x)
    return tensors, x


@pytest.mark.parametrize("method, standard, encoded", [
    ("spt", 4, 0),
    ("dual", 1, 3),
    ("xpe", 0, 4),
])
def test_released_layout_by_hand(method, standard, encoded, tmp_path):
    torch.manual_seed(1)
    prompt = torch.randn(standard, 64)
    head = random_head()
    tensors = {HEAD + name: tensor for name, tensor in head.items()}
    if standard:
        tensors["prompt_encoder.embedding.weight"] = prompt
    if encoded:
        more, finished = random_encoder(encoded)
        tensors |= more
        prompt = torch.cat([prompt, finished])
    config = {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "xpe_ratio": 0.75}
    folder = adapter(tmp_path, tensors, **config)
    model = load(folder)
    assert close(model.prompt(), prompt, 1e-5)
    assert close(logits(model), by_hand(model.backbone, prompt, head), 1e-5)

    cfg = xpe.Config(method=method, xpe_ratio=0.75 if method == "dual" else None, prompt_length=4,
                     mlp_hidden=16, toy=True, device="cpu", init_from=str(folder))
    started, _ = xpe.build_model(cfg, groups.LABELS)           # --init-from keeps the encoder
    started.eval()
    assert torch.equal(started.prompt(), model.prompt())
    order = [groups.SIB200_ORDER.index(label) for label in groups.LABELS]      # theirs differs
    assert close(logits(started), logits(model)[:, order], 1e-6)


SIB200_LABELS_TXT = "science/technology travel politics sports health entertainment geography"


@pytest.mark.parametrize("facts, said, expected", [
    (dict(peft_type="P_TUNING"), "", SIB200_LABELS_TXT.split()),
    (dict(peft_type="XPE"), "", SIB200_LABELS_TXT.split()),
    (dict(peft_type="XPE"), "g,f,e,d,c,b,a", list("gfedcba")),
    (dict(peft_type="PROMPT_TUNING"), "", sorted(SIB200_LABELS_TXT.split())),
    (dict(peft_type="PROMPT_TUNING"), "g,f,e,d,c,b,a", list("gfedcba")),
])
def test_order_of_the_classes(facts, said, expected, tmp_path, capsys):
    name = "prompt_embeddings"
    if facts["peft_type"] != "PROMPT_TUNING":
        name = "prompt_encoder.embedding.weight"
    tensors = {name: torch.randn(4, 64)} | random_head(HEAD)
    tensors[HEAD + "out_proj.bias"][2] = 1000.0                # it always says class 2
    folder = adapter(tmp_path / "adapter", tensors, num_virtual_tokens=4, **facts)
    (tmp_path / "text").write_text("topic1 topic2\n")
    argv = ["--load", folder, "--predict", tmp_path / "text"]
    assert call(*argv, *(["--labels", said] if said else [])) == 0
    out, note = capsys.readouterr()
    assert out.split("\t")[0] == expected[2]
    guessed = facts["peft_type"] == "PROMPT_TUNING" and not said
    assert ("alphabetical" in note) == guessed
    refused(capsys, "7 classes | 2 are named: a, b", *argv, "--labels a,b")


def test_classes_are_known_by_their_names(own, tmp_path, capsys):
    """--init-from permutes what it takes over, or refuses other labels."""
    tensors = {"prompt_embeddings": torch.randn(20, 64)} | random_head(HEAD)
    for kind in ("weight", "bias"):
        tensors[f"{HEAD}out_proj.{kind}"] = tensors[f"{HEAD}out_proj.{kind}"][:2].clone()
    folder = adapter(tmp_path / "adapter", tensors, num_virtual_tokens=20,
                     peft_type="PROMPT_TUNING")
    short = ["--method spt --source xx --languages xx --steps 0 --data", own, "--init-from", folder]
    same = launch(tmp_path / "same", *short, "--labels a,b")
    other = launch(tmp_path / "other", *short, "--labels b,a")
    bias = [load_file(run / "adapter/adapter_model.safetensors")[HEAD + "out_proj.bias"]
            for run in (same, other)]
    assert torch.equal(bias[0], tensors[HEAD + "out_proj.bias"])
    assert torch.equal(bias[1], bias[0].flip(0))
    refused(capsys, "a, z | a, b", *short, "--labels a,z", "--out", tmp_path / "out")


def test_older_layouts(tmp_path, monkeypatch):
    """A pure XPE's pseudo prompt called `embedding`, P_TUNING's finished prompt, and .bin files."""
    torch.manual_seed(1)
    head = random_head()
    tensors, prompt = random_encoder(4)
    tensors["prompt_encoder.embedding.weight"] = tensors.pop("prompt_encoder.xpe_embedding.weight")
    tensors |= {HEAD + name: tensor for name, tensor in head.items()}
    facts = {"peft_type": "P_TUNING", "num_virtual_tokens": 4}
    assert close(load(adapter(tmp_path / "old", tensors, **facts)).prompt(), prompt, 1e-6)

    finished = {"prompt_embeddings": prompt.detach()}
    finished |= {HEAD + name: tensor for name, tensor in head.items()}
    folder = adapter(tmp_path / "stock", finished, **facts)
    assert torch.equal(load(folder).prompt(), prompt)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(finished, folder / "adapter_model.bin")
    assert torch.equal(load(folder).prompt(), prompt)
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    torch.save({"prompt_embeddings": Hostile()}, folder / "adapter_model.bin")
    with pytest.raises(groups.InputError, match="readable"):
        xpe.read_adapter(folder)
    assert not (tmp_path / "executed").exists()


MICM = dict(peft_type="XPE", task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=256,
            encoder_num_layers=2, encoder_dropout=0.1, encoder_freeze=False,
            encoder_embedding_freeze=False, encoder_embedding_init_type="hf_default")


@pytest.mark.parametrize("ratio, kind", [(0, "MLP"), (0.3, "MLP"), (0.7, "MLP"), (1, "MLP"),
                                         (0.7, "LSTM"), (0.7, "ATTN"), (0.7, "NONE")])
def test_the_authors_library_writes_what_we_read(ratio, kind, tiny, tmp_path, capsys):
    micm = pytest.importorskip("micm_nlp.models.xpe", exc_type=ImportError)
    more = dict(encoder_ratio=ratio, encoder_reparameterization_type=kind, encoder_num_heads=4)
    theirs = micm.get_xpe_model(plain_classifier(tiny), MICM | more)
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    theirs.eval().save_pretrained(tmp_path)
    if kind != "MLP":
        with pytest.raises(groups.InputError, match=f"encoder is of type {kind}"):
            load(tmp_path, tiny)
        return
    assert close(logits(load(tmp_path, tiny)), logits(theirs), 1e-5)
    assert xpe.class_names(xpe.read_adapter(tmp_path)) == SIB200_LABELS_TXT.split()
    assert logits(theirs).std() > 0.1


BAD_ADAPTERS = """
prompt_embeddings                       | -     | missing | prompt_embeddings
base_model.classifier.dense.bias        | -     | missing | base_model.classifier.dense.bias
base_model.classifier.out_proj.weight   | -     | missing | base_model.classifier.out_proj.weight
base_model.lora                         | 2     | base_model.lora | none is wanted
prompt_encoder.embedding.weight         | 4 64  | prompt_encoder.embedding.weight | none is wanted
base_model.classifier.out_proj.bias     | 8     | base_model.classifier.out_proj.bias | (8,) | (7,)
prompt_embeddings                       | 5 64  | 5 vectors | num_virtual_tokens is 4
prompt_embeddings                       | 4 32  | prompt_embeddings | (4, 32) | (4, 64)
peft_type                               | LORA  | LORA
num_virtual_tokens                      | many  | adapter
adapter_config.json                     | {     | adapter
adapter_model.safetensors               | {     | adapter
"""


@pytest.mark.parametrize("row", lines_of(BAD_ADAPTERS))
def test_bad_adapter_is_one_line(row, tmp_path, capsys):
    name, value, *words = row
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    tensors = {"prompt_embeddings": torch.randn(4, 64)} | random_head(HEAD)
    if value == "-":
        del tensors[name]
    elif value[0].isdigit():
        tensors[name] = torch.ones(*map(int, value.split()))
    elif name in config:
        config[name] = value
    folder = adapter(tmp_path / "adapter", tensors, **config)
    if value == "{":
        (folder / name).write_text(value)
    refused(capsys, words, "--load", folder, "--languages fra_Latn")
    with pytest.raises(ValueError) as info:
        load(folder)
    for word in words:
        assert word in str(info.value)


def test_load_gives_the_accuracy_of_the_run(runs, capsys):
    accuracy = result(runs["dual"])["accuracy"]
    argv = f"--languages {','.join(accuracy)} --data toy --max-length 32 --load".split()
    capsys.readouterr()
    assert xpe.main([*argv, str(runs["dual"] / "adapter")]) == 0           # it names the backbone
    cells = re.findall(r"([a-z]{3}_[A-Z]\w+) +([\d.]+)", capsys.readouterr().out)
    found = {code: float(percent) for code, percent in cells}
    assert found == {code: round(percent, 1) for code, percent in accuracy.items()}


def test_an_adapter_of_one_vector_can_be_loaded(tmp_path):
    folder = launch(tmp_path, SHORT, 0, "--method spt --prompt-length 1")
    assert call("--languages fra_Latn --load", folder / "adapter") == 0


LINES = [TEXTS[2], "", TEXTS[0], TEXTS[1]]


def test_predict_labels_each_line(runs, tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / "lines"
    path.write_text("\n".join(LINES) + "\n")
    folder = runs["xpe"] / "adapter"
    argv = "--backbone", tiny, "--load", folder, "--predict"

    def answers(source):
        capsys.readouterr()
        assert call(*argv, source) == 0
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    found = answers(path)
    assert [text for _, _, text in found] == LINES
    assert found.pop(1) == ["", "", ""]
    shares, classes = expected_of(load(folder, tiny)).softmax(-1).max(-1)
    for (name, share, _), i in zip(found, (2, 0, 1)):
        assert name == groups.LABELS[classes[i]]
        assert abs(float(share) - shares[i]) < 1e-3
    with open(path) as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert answers("-") == answers(path)


def test_lines_that_cannot_be_read_are_named(runs, tiny, tmp_path, capsys):
    (tmp_path / "bytes").write_bytes(b"fine\n\xff\xfe\n")
    argv = "--backbone", tiny, "--load", runs["xpe"] / "adapter", "--predict"
    refused(capsys, "bytes:2: not UTF-8", *argv, tmp_path / "bytes")
    refused(capsys, "gone", *argv, tmp_path / "gone")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
])
def test_lack_of_memory_is_one_line(error, monkeypatch, capsys):
    def full(cfg):
        raise error

    monkeypatch.setattr(xpe, "use_adapter", full)
    assert xpe.main(["--load", "adapter"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("xpe.py: ")
    assert "emory" in line
    assert line.count("\n") == 1


def test_a_bug_in_a_job_is_no_line(monkeypatch):
    def broken(cfg):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(xpe, "use_adapter", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        xpe.main(["--load", "adapter"])


def test_init_from_a_run_or_an_adapter(runs, tiny, tmp_path, capsys):
    dual = runs["dual"]
    accuracy = result(dual)["accuracy"]
    argv = ENGLISH, "--steps 0 --backbone", tiny, "--languages", ",".join(accuracy), "--init-from"
    for start, method in ((dual, "dual"), (dual / "adapter", "spt")):
        folder = launch(tmp_path / method, *argv, start, "--method", method)
        assert result(folder)["accuracy"] == accuracy
    out = tmp_path / "out"
    for start, method in ((dual, "spt"), (dual / "adapter", "xpe"), (HERE, "spt")):
        other = *argv, start, "--method", method, "--out", out
        refused(capsys, [str(start)], *other)
    assert not out.exists()


# -------------------------------------------------------------------------------------- Benchmark

@pytest.mark.parametrize("method, dtype", [("spt", "bf16"), ("full", "fp32")])
def test_benchmark_counts_operations_as_torch_does(method, dtype, tiny, monkeypatch, capsys):
    counted = []

    def measure(work, **_):                        # whatever the work is: 8 microseconds
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops() / 8000)
        return 8e-6

    monkeypatch.setattr(xpe.timeit, "timeit", measure)
    assert call("--benchmark --method", method, "--dtype", dtype, "--backbone", tiny) == 0
    lines = capsys.readouterr().out.splitlines()
    rates = [int(line.split()[-2]) for line in lines[1:4]]
    assert rates[0] == pytest.approx(counted[0], abs=1)
    if method == "full":
        assert rates[1] == pytest.approx(3 * rates[2], abs=3)
    else:                                          # in bf16 torch counts the attention, too
        assert rates == pytest.approx(counted[:3], abs=1)


def test_benchmark_times_the_step_that_trains(tiny, tmp_path, monkeypatch):
    calls = []
    step = xpe.train_step

    def spy(*arguments):
        calls.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(xpe, "train_step", spy)
    launch(tmp_path, SHORT, 7)
    assert len(calls) == 7
    calls.clear()
    assert call("--benchmark --backbone", tiny) == 0
    assert len(calls) == 1 + 6 * 8                 # one counts the operations


# ---------------------------------------------------------------------------------- Files as text

def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def section(title):
    """The text of xpe.py's section of this title."""
    parts = re.split(r"^# -{20,}\s*|^# ={20,}$", read("xpe.py"), flags=re.M)
    return "#" + next(part for part in parts if part.startswith(title))


def pasted(title, **names):
    """What xpe.py's section of this title defines where nothing but torch and `names` is there."""
    names |= {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(section(title), names)
    return names


def test_prompts_can_be_copied_alone():
    names = pasted("The prompts")
    prompt = names["build_prompt"]("dual", 4, 64, 0.5)
    model = names["PromptedClassifier"](encoder(), prompt, 3)
    assert logits(model.cache_prompt()).shape == (3, 3)


def test_optimizer_and_schedule_can_be_copied_alone():
    names = pasted("Optimizer and schedule", math=math)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([3.0, -3.0])
    names["Adafactor"]([p], lr=0.1).step()         # the first update is the gradient's sign
    assert close(p, torch.tensor([0.9, 1.1]), 1e-6)
    factors = [names["cosine_with_restarts"](step, 2, 10) for step in (1, 2, 4, 6, 10)]
    assert factors == pytest.approx([0.5, 1, 0.5, 1, 0])


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """(names of the README's copying section after its first block, before, the second block)."""
    monkeypatch.chdir(tmp_path)
    text = read("README.md").split("## Copying from it")[1].split("\n## ")[0]
    first, second = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names = pasted("Optimizer and schedule", math=math)
    exec(section("The prompts"), names)
    ids = torch.full((2, 6), 5)
    names["batches"] = [(ids, torch.ones_like(ids), ids[:, 0])] * 3
    names["backbone"] = encoder()
    before = {name: p.clone() for name, p in names["backbone"].named_parameters()}
    exec(first.replace("1024", "64"), names)       # the toy's hidden size
    return names, before, second


def test_readmes_training_runs_as_it_stands(copied):
    names, before, _ = copied
    model = names["model"]
    ids, mask, _ = names["batches"][0]
    assert len(names["free"]) == 1
    assert len(names["rest"]) == 1 + 6 + 4
    assert model.backbone.training
    assert model(ids, mask).shape == (2, 7)
    for name, p in model.backbone.named_parameters():
        assert torch.equal(p, before[name])
    for p in names["free"] + names["rest"]:
        assert p in names["optimizer"].state


def test_readmes_adapter_runs_as_it_stands(copied):
    names, _, second = copied
    ids, mask, _ = names["batches"][0]
    names |= {"json": json, "Path": Path, "NamedTuple": NamedTuple}
    names |= {"InputError": type("InputError", (ValueError,), {})}
    names |= {"contextlib": xpe.contextlib, "os": os, "sys": sys}
    names["backbone"].config.name_or_path = "another"          # which is noted
    exec(section("Files"), names)
    exec(section("Adapters"), names)
    before = names["model"].cache_prompt()(ids, mask)
    exec(second, names)
    assert torch.equal(names["model"].eval()(ids, mask), before)


METHOD = "SoftPrompt PromptedClassifier Adafactor Config train_step train run"
HANDY = "fast RunFolder load_adapter check_settings load_backbone toy_backbone transfer parse main"


def line_of(banner):
    lines = read("xpe.py").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(banner))


def test_the_method_comes_first():
    first, second = line_of("# Part I:"), line_of("# Part II:")
    nodes = ast.parse(read("xpe.py")).body
    docstring, *before = [node for node in nodes if node.lineno < first]
    assert isinstance(docstring.value.value, str)
    for node in before:
        assert isinstance(node, (ast.Import, ast.ImportFrom)), node.lineno
    places = {node.name: node.lineno for node in nodes if hasattr(node, "name")}
    for name in METHOD.split():
        assert first < places[name] < second, name
    for name in HANDY.split():
        assert second < places[name], name


def test_functions_are_short():
    nodes = ast.walk(ast.parse(read("xpe.py")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lengths.pop("train") <= 60
    assert {name: length for name, length in lengths.items() if length > 40} == {}


def test_lines_are_short():
    lines = read("xpe.py").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


def test_help_is_whole():
    shown = subprocess.run([sys.executable, HERE / "xpe.py", "--help"], capture_output=True,
                           text=True)
    flags = {flag(field.name) for field in dataclasses.fields(xpe.Config)}
    assert shown.returncode == 0
    assert flags <= set(re.findall(r"--[\w-]+", shown.stdout))


@pytest.mark.parametrize("where, fence", [
    ("README.md", r"^```\w*\n(.*?)^```"),
    ("xpe.py", r'\A.*?"""(.*?)"""'),
    ("groups.py", r'\A.*?"""(.*?)"""'),
])
def test_every_documented_command_parses(where, fence, tmp_path, monkeypatch):
    blocks = re.findall(fence, read(where), flags=re.M | re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(r"python3? (xpe|groups)\.py\b([^|&;<>\n]*)", text)
    monkeypatch.setattr(groups, "load_runs", lambda folder: 1 / 0)         # so far and no further
    for script, rest in found:
        argv = shlex.split(rest, comments=True)
        if script == "xpe":
            assert isinstance(xpe.parse(argv), xpe.Config)
        else:
            pytest.raises(ZeroDivisionError, groups.main, argv)
    assert found


# ------------------------------------------------------------------------------------------ Trust

ODD_RESULTS = """5 | [1] | null | [] | {} | "text" | {"config": {}} |
{"config": 5, "accuracy": {}} |
{"config": {"method": "spt", "source": "x", "seed": 0, "xpe_ratio": 0}, "accuracy": {"x": "y"}} |
{"config": {"method": "spt", "source": "x", "seed": 0, "xpe_ratio": 0}, "accuracy": {"x": NaN}} |
{"config": {"method": "spt", "source": "x", "seed": 0, "xpe_ratio": 0}, "accuracy": {"x": 5}}"""


@pytest.mark.parametrize("text", ODD_RESULTS.split(" |"))
def test_result_of_another_shape_is_refused(text, whole, tmp_path, capsys):
    path = tmp_path / whole.name / "result.json"
    path.parent.mkdir()
    path.write_text(text.strip())
    before = files(tmp_path)
    refused(capsys, [path.parent.name], SHORT, 100, "--out", tmp_path)
    assert files(tmp_path) == before


ODD_CHECKPOINTS = [
    5, [1], {"config": 5}, {"digests": []}, {"progress": {}}, {"progress": 5},
    {"progress": {"a": 1}},
    {"progress": {"step": 5, "seconds": 1.0, "curve": 5, "best": {}}}, {"model": {}}, {"rng": 5},
    {"rng": torch.zeros(3)}, {"cuda_rng": 5}, {"optimizer": {}}, {"optimizer": {"state": 5}},
]


@pytest.mark.parametrize("odd", ODD_CHECKPOINTS, ids=str)
def test_checkpoint_of_another_shape_is_refused(odd, whole, tmp_path, capsys):
    path = tmp_path / whole.name / "checkpoint.pt"
    path.parent.mkdir()
    torch.save(kept(whole) | odd if isinstance(odd, dict) else odd, path)
    before = files(tmp_path)
    refused(capsys, "checkpoint.pt", SHORT, 100, "--out", tmp_path)
    assert files(tmp_path) == before


def test_log_is_whole_again(whole, tmp_path, monkeypatch):
    """A kill came between an epoch's log and its checkpoint: the log is never behind it."""
    written = []
    write = xpe.write_file

    def killed(path, content):
        written.append(Path(path).name)
        if len(written) == 2 * 7:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(xpe, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, SHORT, 100)
    assert written == 7 * ["log.csv", "checkpoint.pt"]
    log = tmp_path / whole.name / "log.csv"
    assert len(log.read_text().splitlines()) == 1 + 7          # one more than the checkpoint knows
    monkeypatch.setattr(xpe, "write_file", write)
    launch(tmp_path, SHORT, 100)
    assert log.read_text() == (whole / "log.csv").read_text()


def test_checkpoint_of_fine_tuning_goes_even_after_a_kill(tmp_path):
    argv = "--method full --lr 1e-3", SHORT, 5
    folder = launch(tmp_path, *argv)
    (folder / "checkpoint.pt").write_bytes(b"4.5 GB")          # what a kill would leave
    launch(tmp_path, *argv)
    assert not (folder / "checkpoint.pt").exists()


def test_another_encoder_of_the_same_shape_is_refused(tmp_path, tiny, capsys):
    encoder_folder = tmp_path / "encoder"
    shutil.copytree(tiny, encoder_folder)
    argv = SHORT, "5 --backbone", encoder_folder
    folder = launch(tmp_path / "out", *argv)
    weights = load_file(encoder_folder / "model.safetensors")
    save_file({name: t + 1 for name, t in weights.items()}, encoder_folder / "model.safetensors")
    before = files(folder)
    refused(capsys, "encoder", *argv, "--out", tmp_path / "out")
    (folder / "result.json").rename(tmp_path / "result.json")  # as if it were interrupted
    refused(capsys, "encoder", *argv, "--out", tmp_path / "out")
    (tmp_path / "result.json").rename(folder / "result.json")
    assert files(folder) == before


def test_start_that_changed_is_another_start(tmp_path, tiny, capsys):
    start = launch(tmp_path / "start", SHORT, 1)
    argv = [SHORT, 1, "--init-from", start]
    launch(tmp_path / "out", *argv)
    refused(capsys, "another encoder", *argv, "--backbone", tiny, "--out", tmp_path / "other")
    facts = result(start) | {"seconds": 5.0}
    (start / "result.json").write_text(json.dumps(facts))
    refused(capsys, "start", *argv, "--out", tmp_path / "out")
    refused(capsys, "no such folder", SHORT, "1 --init-from", tmp_path / "gone")


@pytest.mark.parametrize("argv, words", [
    ("--load there --steps 5", "--steps has no effect with --load"),
    ("--load there --pool bos", "--pool has no effect with --load"),
    ("--target-steps 5", "--target-steps has no effect without --target"),
    ("--labels a,b", "--labels names the classes of an adapter"),
    ("--clip 0", "--clip 0"),
])
def test_flag_without_effect_is_refused(argv, words, capsys):
    refused(capsys, words, argv)


def test_adapter_knows_the_length_of_its_texts(tmp_path, capsys):
    folder = launch(tmp_path, "--method spt", ENGLISH, "--steps 40 --max-length 5")
    capsys.readouterr()
    assert call("--languages eng_Latn --load", folder / "adapter") == 0
    percent = result(folder)["accuracy"]["eng_Latn"]
    assert f"eng_Latn {percent:5.1f}" in capsys.readouterr().out


def test_numbers_of_other_types_are_numbers():
    cfg = xpe.Config(seed=np.int64(3), lr=np.float32(0.5), data=Path("here"))
    assert [type(value) for value in (cfg.seed, cfg.lr, cfg.data)] == [int, float, str]
    with pytest.raises(groups.InputError, match="--steps 2.5: must be of type int"):
        xpe.Config(steps=2.5)


def test_method_of_your_own_is_reported_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(xpe.SHARES, "mine", 0.0)               # like spt
    folder = launch(tmp_path, ENGLISH, "--steps 1 --method mine")
    assert groups.load_runs(tmp_path)[0].label == "MINE"
    assert folder.name.startswith("toy-mine")


def test_benchmark_needs_room_for_its_texts(capsys):
    refused(capsys, "128 positions", "--benchmark --prompt-length 110 --max-length 10")


def test_dangling_out_is_found_at_once(tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(capsys, "link", "--out", tmp_path / "link")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("name, value, words", [
    ("num_virtual_tokens", -4, "num_virtual_tokens | -4"),
    ("num_virtual_tokens", 10**12, "num_virtual_tokens | 1000000000000"),
    ("num_virtual_tokens", True, "num_virtual_tokens | True"),
    ("num_virtual_tokens", 4.0, "num_virtual_tokens | 4.0"),
    ("labels", "abcdefg", "labels | abcdefg"),
    ("labels", ["a"] * 7, "7 classes | 1 are named"),
    ("labels", ["a", "b"], "7 classes | a, b"),
    ("labels", {"a": 1}, "labels"),
    ("max_length", "long", "not a readable adapter | long"),
])
def test_odd_adapter_is_refused_by_name(name, value, words, tmp_path, capsys):
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4} | {name: value}
    tensors = {"prompt_embeddings": torch.randn(4, 64)} | random_head(HEAD)
    folder = adapter(tmp_path / "adapter", tensors, **config)
    if name in ("labels", "max_length"):
        (folder / "xpe.json").write_text(json.dumps({name: value}))
    refused(capsys, words, "--load", folder, "--languages fra_Latn")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_value_that_is_not_finite_is_refused_by_its_tensor(value, tmp_path, capsys):
    tensors = {"prompt_embeddings": torch.randn(4, 64)} | random_head(HEAD)
    tensors[HEAD + "dense.bias"][3] = value
    folder = adapter(tmp_path / "adapter", tensors, peft_type="PROMPT_TUNING", num_virtual_tokens=4)
    refused(capsys, "dense.bias | finite", "--load", folder, "--languages fra_Latn")


def test_tiny_file_that_asks_for_much_memory_is_refused(tmp_path, capsys):
    tensors = {"prompt_embeddings": torch.zeros(1).expand(10**6, 10**4)} | random_head(HEAD)
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**6}
    folder = adapter(tmp_path / "adapter", random_head(HEAD), **config)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    refused(capsys, "prompt_embeddings | larger", "--load", folder, "--languages fra_Latn")


def test_endless_input_gets_answers(runs, tiny):
    argv = [sys.executable, HERE / "xpe.py", "--toy", "--backbone", tiny, "--predict", "-"]
    command = " ".join(map(str, [*argv, "--load", runs["xpe"] / "adapter"]))
    shown = subprocess.run(["bash", "-c", f"yes topic1 | {command} | head -n 2"], text=True,
                           capture_output=True, timeout=300)
    assert shown.stdout.count("topic1") == 2
    assert shown.stderr.count("\n") <= 1


def test_adapter_can_be_read_by_others(runs):
    for path in (runs["dual"] / "adapter").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~UMASK, path


# ------------------------------------------------------------------- Encoders that a user brings

LONG_TEXTS = ["topic1 topic2 filler3", "topic11", " ".join(f"topic{i}" for i in range(28))]
LOADED = "--data toy --languages eng_Latn".split()
RUN = ("--data toy --source eng_Latn --languages eng_Latn --max-length 32 --prompt-length 6 "
       "--steps 2").split()
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


def tiny_encoder(folder, name, **settings):
    """A tiny random encoder and the toy's tokenizer in a folder."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**SMALL, **settings}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)        # so that differences show
    model.save_pretrained(folder)
    xpe.toy_backbone()[1].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pool", ["first", "bos"])
@pytest.mark.parametrize("length", [6, 0])
@pytest.mark.parametrize("name", GOOD)
def test_logits_by_hand_whatever_the_padding(name, length, pool, tmp_path):
    backbone, tokenizer = xpe.load_backbone(str(tiny_encoder(tmp_path, name, **GOOD[name])))
    prompt = xpe.SoftPrompt(length, xpe.width(backbone))
    model = xpe.PromptedClassifier(backbone, prompt, 7, pool).eval()
    examples = [xpe.Example(text, "a", "xx", 0) for text in LONG_TEXTS]
    expected = []
    for text in LONG_TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        vectors = torch.cat([prompt.vectors, backbone.get_input_embeddings()(ids)[0]])[None]
        inputs = dict(inputs_embeds=vectors) if length else dict(input_ids=ids)
        states = backbone(**inputs).last_hidden_state[:, length if pool == "bos" else 0]
        expected.append(model.head(states))
    expected = torch.cat(expected)
    found = xpe.predict(model, xpe.tokenize(examples, ["a"], tokenizer))
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", GOOD)
def test_command_line_and_its_adapter(name, tmp_path, capsys):
    backbone = tiny_encoder(tmp_path / "encoder", name, **GOOD[name])
    for kind in ([], ["--dtype", "bf16", "--backbone-dropout", "off"]):
        out = tmp_path / f"out{len(kind)}"
        assert xpe.main(["--backbone", str(backbone), *RUN, *kind, "--out", str(out)]) == 0
        run = next(out.iterdir())
        config = json.loads((run / "adapter/adapter_config.json").read_text())
        pefts = name in ("XLMRobertaModel", "CamembertModel")
        assert config["peft_type"] == ("PROMPT_TUNING" if pefts else "XPE_PROMPT")
        accuracy = json.loads((run / "result.json").read_text())["accuracy"]["eng_Latn"]
        loading = ["--load", run / "adapter", *LOADED, "--max-length", 32, *kind[:2]]
        capsys.readouterr()
        assert call(*loading, toy=False) == 0
        assert f"eng_Latn {accuracy:5.1f}" in capsys.readouterr().out


def test_rotary_angles_stay_in_fp32(tmp_path):
    folder = tiny_encoder(tmp_path, "EuroBertModel", num_key_value_heads=4)
    backbone, _ = xpe.load_backbone(str(folder), dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert backbone.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("name", BAD)
def test_encoder_that_cannot_be_prompted(name, tmp_path, capsys):
    settings, words = BAD[name]
    backbone = tiny_encoder(tmp_path / "encoder", name, **settings)
    refused(capsys, words, "--backbone", backbone, *RUN, "--out", tmp_path / "out", toy=False)
    assert not (tmp_path / "out").exists()


def edit(name, **changes):
    """A change of a JSON file in a folder."""
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))
    return change


def weights(name="{}", keep="", factor=1):
    """A change of an encoder's weights: their names, which are kept, their values."""
    def change(folder):
        path = folder / "model.safetensors"
        there = load_file(path)
        tensors = {name.format(key): factor * there[key] for key in there if keep in key}
        save_file(tensors, path, metadata={"format": "pt"})
    return change


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def hostile(folder):
    """Code of its one_language, which would leave a file."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\n")
    edit("config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})(folder)


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("change, words", [
    (without_tokenizer, "is not the encoder's: it has"),
    (weights(name="foreign.{}"), "do not fill the encoder: embeddings.LayerNorm.bias"),
    (weights(keep="embeddings"), "do not fill the encoder: encoder.layer.0"),
    (weights(factor=torch.nan), "are not finite"),
    (edit("tokenizer_config.json", pad_token=None), "padding is None"),
    (edit("config.json", pad_token_id=None), "cannot be prompted"),
    (edit("config.json", return_dict=False, chunk_size_feed_forward=4), ""),
    (edit("config.json", gradient_checkpointing=True), ""),
    (edit("tokenizer_config.json", model_input_names=["input_ids"]), ""),
    (content("config.json", b"{garbage"), "not a valid JSON"),
    (content("model.safetensors", b"version https://git-lfs"), "SafetensorError"),
    (edit("tokenizer.json", post_processor=None), "no special token"),
    (hostile, "custom code"),
])
def test_broken_encoder(change, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    backbone, out = tiny_encoder(tmp_path / "encoder", "XLMRobertaModel"), tmp_path / "out"
    change(backbone)
    pool = "bos" if "special" in words else "first"
    argv = ["--backbone", backbone, *RUN, "--pool", pool, "--out", out]
    if not words:
        assert call(*argv, toy=False) == 0
        return
    refused(capsys, words, *argv, toy=False)
    assert not out.exists() and not (backbone / "ran").exists()


@pytest.mark.parametrize("name, table", [("BertModel", 128), ("XLMRobertaModel", 130)])
def test_room_is_used_to_the_last_position(name, table, tmp_path, capsys):
    backbone = tiny_encoder(tmp_path / "encoder", name, max_position_embeddings=table)
    argv = ["--backbone", backbone, *RUN, "--out", tmp_path / "out", "--max-length"]
    words = "--prompt-length 6 + --max-length 123: more than the 128"
    refused(capsys, words, *argv, 123, toy=False)
    assert call(*argv, 122, toy=False) == 0


def test_hub_is_asked_once(capsys, tmp_path, monkeypatch):
    def ask(url):
        raise ConnectionError(f"no network for {url}")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    words = "no network for https://huggingface.co/"
    out = "--out", tmp_path
    refused(capsys, words + "models/xlmr", "--backbone models/xlmr", *RUN, *out, toy=False)
    refused(capsys, words + "datasets/my/data", "--data my/data", *out, toy=False)


def toy_adapter(folder, length):
    """An adapter for the toy's encoder."""
    backbone, _ = xpe.load_backbone("toy")
    model = xpe.PromptedClassifier(backbone, xpe.SoftPrompt(length, 64), 7)
    xpe.save_adapter(model, folder, facts=dict(labels=list(groups.LABELS)))


@pytest.mark.parametrize("name, changes, words", [
    ("ElectraModel", {}, "PEFT's head for electra is not XLM-R's"),         # gelu, the same names
    ("XLMRobertaModel", dict(num_virtual_tokens="1"), "num_virtual_tokens is '1'"),
    ("XLMRobertaModel", {}, ""),                   # one virtual token
    ("ElectraModel", dict(peft_type="XPE_PROMPT"), ""),
])
def test_adapter_of_another_encoder(name, changes, words, tmp_path, capsys):
    toy_adapter(tmp_path / "adapter", 1)
    edit("adapter_config.json", **changes)(tmp_path / "adapter")
    backbone = tiny_encoder(tmp_path / "encoder", name, hidden_size=64, embedding_size=64)
    argv = ["--load", tmp_path / "adapter", "--backbone", backbone, *LOADED, "--max-length", 32]
    if words:
        refused(capsys, words, *argv, toy=False)
    else:
        assert call(*argv, toy=False) == 0


def test_start_from_an_adapter_with_another_pool(tmp_path, capsys):
    toy_adapter(tmp_path / "first", 6)
    argv = ["--toy", *RUN, "--method", "spt", "--init-from", tmp_path / "first", "--out", tmp_path]
    refused(capsys, "--pool first", *argv, "--pool", "bos", toy=False)
    assert call(*argv, toy=False) == 0


# ---------------------------------------------------------------------- Files that a user brings

HEADER = b"index_id\tcategory\ttext\n"
ROWS = HEADER + b"0\ta\ttopic1 topic2\n1\tb\ttopic11\n"
LAST = ("topic11", "b")


@pytest.fixture
def one_language(tmp_path):
    """A data folder with one language, xx, and labels a and b."""
    for split in ("train", "dev", "test"):
        path = tmp_path / f"own/xx/{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ROWS)
    return tmp_path / "own"


@pytest.mark.parametrize("data, last", [
    (b"\xef\xbb\xbfcategory\ttext\na\ttopic1 topic2\nb\ttopic11", LAST),
    (ROWS.replace(b"\n", b"\r\n"), LAST),
    (ROWS.replace(b"\n", b"\t\n"), LAST),
    (ROWS + b"\n\n", LAST),
    (ROWS + b"2\t b \ttopic11", LAST),
    (ROWS + b'2\ta\the "said" it\n', ('he "said" it', "a")),
    (ROWS + b'2\ta\t"one\ttwo"\n', ("one\ttwo", "a")),
    (ROWS + b'2\ta\t"one\ntwo"\n', ("one\ntwo", "a")),
    (ROWS + b"2\t0\tto\0pic\xe2\x80\xa8 7\n", ("to\0pic\u2028 7", "0")),
    (ROWS + b"2\ta\t" + b"x" * 200_000, ("x" * 200_000, "a")),
])
def test_file_is_read_right(data, last, one_language):
    (one_language / "xx/train.tsv").write_bytes(data)
    texts, labels = xpe.load_language(str(one_language), "xx", "train")
    assert (texts[-1], labels[-1]) == last
    assert (texts[0], labels[0]) == ("topic1 topic2", "a")


@pytest.mark.parametrize("data, words", [
    (ROWS + b"2\ta\ttopic1\ttopic2\n", "train.tsv:4: more columns than the header has"),
    (HEADER + b'0\ta\t"one\n1\tb\ttwo"\n', "train.tsv:3: more columns"),   # two rows in one
    (ROWS + b'2\ta\t"one" two\n', "train.tsv, behind line 3"),
    (ROWS + b'2\ta\t"one\n3\tb\ttwo\n', "train.tsv, behind line 3"),
    (ROWS * 900 + b"2\ta\tcaf\xe9\n", "train.tsv:2701: not UTF-8"),
    (ROWS.decode().encode("utf-16"), "train.tsv:1: not UTF-8"),
    (ROWS.replace(b"index_id", b"text"), "['text', 'category', 'text']"),
    (ROWS.replace(b"category", b"Category"), "one must be category"),
    (b"", "the columns are []"),
    (HEADER, "no train rows for xx"),
    (ROWS + b"2\ta\n", "train.tsv:4: empty text"),
    (ROWS + b"2\t\ttopic1\n", "train.tsv:4: unknown label ''"),
    (ROWS.replace(b"\tb\t", b"\t0\t"), "dev.tsv:3: unknown label 'b'; known: 0, a"),
])
def test_bad_file_is_one_line(data, words, one_language, capsys):
    (one_language / "xx/train.tsv").write_bytes(data)
    argv = ["--toy", "--data", one_language, "--source", "xx", "--languages", "xx", "--steps", 1]
    refused(capsys, words, *argv, "--out", one_language / "out", toy=False)
    assert not (one_language / "out").exists()


def move(source, target):
    return lambda data: (data / source).rename(data / target)


def in_its_place(data):
    move("xx/train.tsv", "moved")(data)
    (data / "xx/train.tsv").mkdir()


def linked(data):
    (data / "xx").rename(data.parent / "elsewhere")
    (data / "xx").symlink_to(data.parent / "elsewhere")


def of_csv(data):
    for path in (data / "xx").iterdir():
        path.rename(path.with_suffix(".csv"))


@pytest.mark.parametrize("change, words", [
    (lambda data: shutil.copytree(data / "xx", data / ".ipynb_checkpoints"), ""),
    (linked, ""),
    (move("xx/train.tsv", "xx/train.csv"), "train.csv is there: write it with tabs"),
    (of_csv, "train.csv is there: write train.tsv"),
    (move("xx/train.tsv", "xx/TRAIN.TSV"), "train.tsv: cannot be read (FileNotFoundError"),
    (in_its_place, "IsADirectoryError"),
    (move(".", "../moved"), "no such folder"),
])
def test_folder(change, words, one_language, capsys):
    change(one_language)
    argv = ["--toy", "--data", one_language, "--source", "xx", "--languages", "all", "--steps", 1]
    argv += ["--out", one_language.parent / "out"]
    if words:
        refused(capsys, words, *argv, toy=False)
    else:
        assert call(*argv, toy=False) == 0
        assert xpe.available_codes(str(one_language)) == ["xx"]


def data_set(folder, categories, names=()):
    """A local folder for load_dataset with texts 7, 8, ... and these categories."""
    folder.mkdir(exist_ok=True)
    rows = [dict(text=7 + i, category=category) for i, category in enumerate(categories)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = "---\nconfigs:\n- config_name: xx\n  data_files:\n  - {split: train, path: rows.jsonl}\n"
    if names:
        card += "dataset_info:\n- config_name: xx\n  features:\n  - {name: text, dtype: int64}\n"
        card += f"  - {{name: category, dtype: {{class_label: {{names: {list(names)}}}}}}}\n"
    (folder / "README.md").write_text(card + "---\n")
    return str(folder)


def test_typed_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    numbers = data_set(tmp_path / "a", [1, 0])
    assert xpe.load_language(numbers, "xx", "train") == (["7", "8"], ["1", "0"])
    data_set(tmp_path / "a", [2, 3, 4])            # the file has changed, its path has not
    assert xpe.load_language(numbers, "xx", "train")[1] == ["2", "3", "4"]
    named = data_set(tmp_path / "b", [1, 0], ["sun", "rain"])
    assert xpe.load_language(named, "xx", "train")[1] == ["rain", "sun"]
    data_set(tmp_path / "b", [-1], ["sun", "rain"])
    with pytest.raises(groups.InputError, match="Invalid integer class label -1"):
        xpe.load_language(named, "xx", "train")


def test_output_is_utf8_whatever_the_locale(tmp_path):
    toy_adapter(tmp_path, 6)
    command = [sys.executable, xpe.__file__, "--toy", "--load", tmp_path, "--predict", "-"]
    environment = dict(os.environ, PYTHONIOENCODING="cp1252")
    text = "თბილისი".encode()
    done = subprocess.run(command, input=text, capture_output=True, env=environment)
    assert done.returncode == 0 and text in done.stdout


# ----------------------------------------------------------------------------------------- The bars
LONG = "--toy --source eng_Latn --steps 100000 --out runs".split()
STOPPED = "xpe.py: stopped by {}; an unfinished run goes on with the same command\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


def on_terminal(monkeypatch):
    """Put a terminal of 80 columns in the place of standard error; -> it."""
    monkeypatch.setattr(os, "get_terminal_size", lambda file: os.terminal_size((80, 24)))
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_one_bar_runs_over_all_epochs_of_a_resumed_run(monkeypatch, capsys):
    terminal = on_terminal(monkeypatch)
    row = dict(epoch=1, step=7000, loss=1.5, dev_loss=1.5, lr=1e-3)
    progress = xpe.Progress(7000, 60 * 3600, [dict(row, dev_accuracy=61.0)])
    log = xpe.Log(xpe.Config(toy=True, steps=24_000), progress, 1.0)
    log.bar.mininterval = 0  # drawn at each step, not each second
    log.bar.start_t -= 3600  # as if it had begun an hour ago
    for accuracy in (50.0, 99.0):
        for _ in range(5):
            log.step(torch.tensor(1.5), 1e-3)
        progress.curve.append(dict(row, dev_accuracy=accuracy))
        log.epoch(progress, 7)

    shown = re.split(r"[\r\n]", terminal.getvalue())
    assert max(map(len, shown)) <= 80
    bars = re.findall(r"step (\d+)/24000 \|.*\| (\d+):.* dev (.*)", "\n".join(shown))
    steps = [int(step) for step, _, _ in bars]
    assert steps == sorted(steps)
    assert set(steps) == set(range(7001, 7011))
    for step, hours, dev in bars:
        assert hours == "1"  # never from 0 again
        assert dev == ("61.0%" if int(step) <= 7005 else "50.0%") or int(step) == 7006
    header, *rows = capsys.readouterr().out.splitlines()
    assert {len(line) for line in (header, *rows)} == {70}


@pytest.mark.parametrize("codes, title", [
    (["fra_Latn", "kab_Latn"], "dev: 2 languages |"), (["kab_Latn"], "dev: 1 language |")])
def test_bar_of_an_evaluation_is_named_and_counts_batches(codes, title, monkeypatch):
    examples = xpe.load_examples("toy", codes, "dev")
    sentences = xpe.tokenize(examples, groups.LABELS, xpe.load_backbone("toy")[1])
    on_terminal(monkeypatch)
    assert xpe.progress_bar("", range(9)).disable  # it has no title
    made = []
    kept = xpe.progress_bar
    monkeypatch.setattr(xpe, "progress_bar", lambda *said: made.append(kept(*said)) or made[0])
    xpe.evaluate(model_of(), sentences, "dev")
    assert made[0].bar_format.startswith(title)
    assert made[0].n == made[0].total == len(xpe.evaluation_batches(sentences.lengths, 6))


def test_batches_of_an_evaluation_take_about_as_long():
    """So the bar's time left, which counts batches, is right though the longest come first."""
    lengths = np.random.default_rng(0).integers(5, 165, 41_820)
    batches = xpe.evaluation_batches(lengths, 20)
    positions = [len(batch) * (lengths[batch].max() + 20) for batch in batches[:-1]]
    assert min(positions) > 0.95 * max(positions)


def test_help_fits_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        xpe.parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:-1] for line in lines if line[:-1] in xpe.HELP_GROUPS.values()] == [
        *xpe.HELP_GROUPS.values()]
    assert "  --steps 24000         optimization steps (4.4)" in lines


# -------------------------------------------------------------------------------------- The signals
def start(folder, *command, **settings):
    """A process whose output is piped; `python` is this one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | settings | dict(PATH=path, PYTHONUNBUFFERED="")
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=pipe, stderr=pipe)


def read_until(stream, pattern):
    """Read lines up to one that matches, which arrives while the process is at work."""
    assert any(re.match(pattern, line) for line in stream)


def test_slurm_task_is_stopped_with_one_line_and_goes_on_when_requeued(tmp_path):
    grid = ["bash", str(HERE / "run_all.sh"), "--toy", "table1"]
    task = dict(SLURM_ARRAY_TASK_ID="1", STEPS="100000", SEEDS="0")
    process = start(tmp_path, *grid, **task)
    read_until(process.stdout, " +2 ")  # the row of the second epoch
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert error == STOPPED.format("SIGTERM")
    assert process.returncode == 143

    process = start(tmp_path, *grid, **task)
    read_until(process.stdout, "going on from step")
    process.kill()
    process.communicate()


def test_ctrl_c_answers_while_a_file_is_written(tmp_path):
    script = """
import os, sys, time
sys.argv[0] = "xpe.py"
import xpe
os.fsync = lambda file: print("writing") or time.sleep(60)
xpe.main(sys.argv[1:])"""
    process = start(tmp_path, "python", "-c", script, *LONG, PYTHONPATH=str(HERE))
    read_until(process.stdout, "writing")
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=50)[1]
    assert error == STOPPED.format("SIGINT")
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))  # never half of one


def at_terminal(folder, argv, moment):
    """A run at a terminal, Ctrl-C once it shows `moment`; -> (exit code, all that it showed)."""
    keyboard, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, str(HERE / "xpe.py"), *argv], cwd=folder,
                               stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = ""
    with contextlib.suppress(OSError):  # when the other end is closed
        while select.select([keyboard], [], [], 60)[0]:
            shown += os.read(keyboard, 65536).decode(errors="replace")
            if moment in shown:
                process.send_signal(signal.SIGINT)
    process.kill()
    os.close(keyboard)
    return process.wait(), shown


@pytest.mark.parametrize("moment", [
    "loading torch", "reading the", "step 0/", "dev: 1 language ", "test: 205 languages "])
def test_ctrl_c_answers_everywhere_with_one_line(moment, tmp_path):
    argv = [*LONG, "--prompt-length", "90"]  # long enough a test
    if "test" in moment:
        argv += ["--steps", "5"]
    code, shown = at_terminal(tmp_path, argv, moment)
    assert code == 130
    last = shown.split("\r\x1b[K")[-1]  # what follows the clearing of the line
    last = last.replace("\x1b[A", "")   # a bar was just moving up
    assert last.split() == STOPPED.format("SIGINT").split()


# ------------------------------------------------------------------------------ What is finished
def test_finished_run_is_known_without_its_encoder(tmp_path, monkeypatch):
    argv = ["--toy", *SHORT.split(), "5", "--out", str(tmp_path)]
    target = [*argv, "--target-steps", "3", "--target", "kab_Latn"]
    cfg = xpe.parse(target)
    assert not xpe.finished(cfg)
    assert xpe.main(target) == 0
    monkeypatch.delattr(xpe, "build_model")
    assert xpe.finished(cfg)
    assert xpe.finished(xpe.parse(argv))
    assert not xpe.finished(xpe.parse([*target, "--target", "kab_Latn,swh_Latn"]))
    assert not xpe.finished(xpe.parse([*target, "--clip", "2"]))


# ----------------------------------------------------------------------------------- The whole grid
def listed(folder, *argv, **settings):
    """The lines of `run_all.sh --list`."""
    return shell(folder, *GRID, "--list", *argv, **settings).communicate()[0].splitlines()


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


def cell(cfg):
    """What tells a run of the grid from the others."""
    ratio = cfg.xpe_ratio if cfg.method == "dual" else None
    return cfg.method, ratio, cfg.source, cfg.seed


def test_grid_lists_the_runs_of_the_paper(tmp_path):
    lines = listed(tmp_path, "--dtype", "bf16")
    configs = [xpe.parse(shlex.split(line)[2:]) for line in lines]
    table1, table2, table3 = configs[:120], configs[120:138], configs[138:]
    sequential = [cfg for cfg in table3 if cfg.target]
    baselines = [cfg for cfg in configs if cfg.method == "full"]
    assert len(lines) == len(set(lines)) == 120 + 46 * 6 + (46 + 3) * 6
    assert not list(tmp_path.iterdir())

    methods = [("spt", None), ("dual", 0.3), ("dual", 0.7), ("xpe", None)]
    assert {cell(cfg) for cfg in table1} == {
        (*method, source, seed)
        for method in methods for source in groups.SOURCES for seed in range(10)}
    assert {cell(cfg) for cfg in table2} == {
        ("full", None, source, seed)
        for source in ("eng_Latn", "arb_Arab", "zho_Hans") for seed in range(6)}
    assert {cell(cfg)[:3] for cfg in sequential} == {("dual", 0.7, "joshi5")}
    assert {cfg.target for cfg in sequential} == set(groups.FULL_SUPERVISION_TARGETS)
    assert len(sequential) == 46 * 6
    assert len(baselines) == (46 + 3) * 6

    assert {cfg.steps for cfg in [*table1, *sequential]} == {24_000}
    assert {cfg.target_steps for cfg in sequential} == {6_000}
    assert {cfg.steps for cfg in baselines} == {6_000}
    assert {cfg.dtype for cfg in [*table1, *sequential]} == {"bf16"}
    assert {cfg.dtype for cfg in baselines} == {"fp32"}


def test_grid_lists_each_table_for_any_seeds(tmp_path):
    sizes = [len(listed(tmp_path, f"table{n}", SEEDS="3 5")) for n in (1, 2, 3)]
    assert sizes == [24, 6, 2 * 2 * 46]
    both = listed(tmp_path, "table1", "table2")
    assert both == listed(tmp_path)[:138]
    assert {line.split()[-1] for line in listed(tmp_path, "table2", SEEDS="7")} == {"7"}


@pytest.mark.parametrize("words", [
    ["--steps"], ["--seed=1"], ["--out"], ["--method"], ["--source=seen"], ["tabel1"]])
def test_grid_refuses_what_it_sets_itself(words, tmp_path):
    process = shell(tmp_path, *GRID, "--list", *words, "3")
    error = process.communicate()[1]
    assert process.returncode == 2
    assert error.startswith("run_all.sh: ")
    assert error.count("\n") == 1


def test_grid_refuses_steps_that_are_no_number(tmp_path):
    process = shell(tmp_path, *GRID, "--list", "--clip", "3", STEPS="m")
    assert process.communicate()[1].startswith("run_all.sh: ")
    assert process.returncode == 2


def test_killed_grid_goes_on_and_fills_the_tables(tmp_path, capsys):
    lines = listed(tmp_path, "--toy", STEPS="60")
    script = lines[0] + " && " + lines[3]  # two cells: SPT and XPE, from Joshi5
    first = tmp_path / "runs/toy-spt-joshi5-s0"
    second = tmp_path / "runs/toy-xpe-joshi5-s0"
    process = shell(tmp_path, "bash", "-c", script)
    await_checkpoint(second, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = files(first)
    assert (first / "result.json").exists()
    assert not (second / "result.json").exists()

    again = shell(tmp_path, "bash", "-c", script)
    assert "going on from step" in again.communicate()[0]
    assert again.returncode == 0
    assert files(first) == before

    spt, xpe_ = [f"{result(folder)['groups'][UNSEEN]:.1f} (1)" for folder in (first, second)]
    cells = rows(capsys, str(tmp_path / "runs"), UNSEEN, "joshi5")[0]
    assert cells[0].split(" · ")[0] == spt
    assert cells[1:3] == ["· 56.4", "· 57.6"]
    assert cells[3].split(" · ")[0] == xpe_


def test_grid_fails_loudly_and_the_other_runs_go_on(stub, tmp_path):
    path = stub("""echo "$*" >> ran
      case "$*" in *spt*enarzho*"--seed 1") echo "xpe.py: no luck" >&2; exit 1 ;; esac""")
    process = shell(tmp_path, *GRID, "--toy", path=path)
    output, error = process.communicate()
    ran = (tmp_path / "ran").read_text().splitlines()
    assert process.returncode == 1
    assert len(ran) == len(set(ran)) == 46
    assert error.count("FAILED") == 1
    assert "13/46 spt-enarzho-s1: xpe.py: no luck\n13/46 spt-enarzho-s1: FAILED: " in error
    assert output.count(": done\n") == 45
    assert "46/46 full-kab_Latn-s1: done\n" in output


def test_grid_knows_failed_from_stopped(stub, tmp_path):
    path = stub('case "$*" in *spt*) exit 143 ;; *) exit 0 ;; esac')
    process = shell(tmp_path, *GRID, "--toy", "table1", path=path, SEEDS="0")
    error = process.communicate()[1]
    assert process.returncode == 1
    assert error.count(": stopped\n") == 3
    assert "FAILED" not in error


def test_slurm_task_is_the_run_itself(stub, tmp_path):
    path = stub('echo "$$ $*" > ran')
    line = listed(tmp_path, "--toy")[45]
    task = shell(tmp_path, *GRID, "--toy", path=path, SLURM_ARRAY_TASK_ID="46")
    assert task.communicate()[0] == line + "\n"
    pid, ran = (tmp_path / "ran").read_text().strip().split(" ", 1)
    assert "python " + ran == line
    assert int(pid) == task.pid  # no shell is left to be signalled in its place

    task = shell(tmp_path, *GRID, "--toy", SLURM_ARRAY_TASK_ID="47")
    assert "46 lines" in task.communicate()[1]
    assert task.returncode == 2


def test_slurms_copy_of_the_grid_finds_its_folder_or_names_it(tmp_path):
    copy = tmp_path / "slurm_script"
    copy.write_bytes((HERE / "run_all.sh").read_bytes())
    found = shell(tmp_path, "bash", copy, "--list", "table2", SLURM_SUBMIT_DIR=str(HERE))
    assert found.communicate()[0].splitlines() == listed(tmp_path, "table2")
    lost = shell(tmp_path, "bash", copy, SLURM_SUBMIT_DIR=str(tmp_path))
    assert f"no xpe.py in {tmp_path}" in lost.communicate()[1]
    assert lost.returncode == 2


def has_ended(pid):
    """Whether a process is gone, or a zombie that its parent has yet to collect."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_grid_ends_what_it_started(number, stub, tmp_path):
    path = stub('echo $$ >> pids; echo >> "$PWD/started"; exec sleep 60')
    process = shell(tmp_path, *GRID, "--toy", path=path)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == "run_all.sh: stopped; the same command goes on\n"
    pids = (tmp_path / "pids").read_text().split()
    assert pids
    assert all(map(has_ended, pids))


@pytest.mark.parametrize("finished, runs", [
    ("True", 0),
    ("'dual' in argv or 1 / ('xpe' in argv)", 3)])  # SPT's raise an error, and XPE's are finished
def test_finished_grid_runs_nothing_and_loads_torch_once(finished, runs, stub, tmp_path):
    path = stub("echo >> ran")
    for name in ("run_all.sh", "groups.py"):
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    (tmp_path / "ran").touch()
    (tmp_path / "xpe.py").write_text(f"""
print("loaded", file=open("loaded", "a"))
parse = list
def finished(argv):
    return {finished}
""")
    process = shell(tmp_path, "bash", "run_all.sh", "--toy", "table1", path=path, SEEDS="0")
    output = process.communicate()[0]
    assert (tmp_path / "loaded").read_text() == "loaded\n"
    assert (tmp_path / "ran").read_text() == "\n" * runs
    assert output.count(": done\n") == runs


# --------------------------------------------------------------------------------------- groups.py
SIZES = dict(LANGUAGES=205, LABELS=7, ENARZHO=3, JOSHI5=7, SEEN=92, UNSEEN=113, LOW_PERFORMING=46)
COLUMNS = {
    "zs_eng": ("SIB-200", "eng_Latn"),
    "zs_ara": ("SIB-200", "arb_Arab"),
    "zs_zho": ("SIB-200", "zho_Hans"),
    "gpt35": ("GPT-3.5", "-"),
    "gpt4": ("GPT-4", "-"),
}


def test_groups_have_their_sizes_and_nest():
    for name, size in SIZES.items():
        members = getattr(groups, name)
        assert len(set(members)) == len(members) == size, name
    assert [len(codes) for codes in groups.TARGET_GROUPS.values()] == [46, 113, 85, 198]
    assert {*groups.ENARZHO} < {*groups.JOSHI5} < {*groups.SEEN}
    assert {*groups.LOW_PERFORMING} < {*groups.UNSEEN}
    assert "nqo_Nkoo" in groups.LOW_PERFORMING
    seen = {*groups.FULL_SUPERVISION_SEEN}
    unseen = {*groups.FULL_SUPERVISION_UNSEEN}
    assert seen < {*groups.SEEN}
    assert unseen < {*groups.UNSEEN}
    assert len(seen) == len(unseen) == 23
    assert len(unseen & {*groups.LOW_PERFORMING}) == 11  # section 4.2


def test_labels_in_sib200s_order_agree_nowhere_with_the_alphabet():
    assert sorted(groups.SIB200_ORDER) == sorted(groups.LABELS) == list(groups.LABELS)
    assert not any(map(str.__eq__, groups.SIB200_ORDER, groups.LABELS))


def gap(column, group, nko=None):
    """Distance of the mean of the published scores, with this one for N'Ko, from the Table 2."""
    scores = {code: getattr(row, column) for code, row in groups.LANGUAGES.items()}
    scores["nqo_Nkoo"] = nko
    known = {code: score for code, score in scores.items() if score is not None}
    place = list(groups.TARGET_GROUPS).index(group)
    return abs(groups.group_means(known)[group] - groups.TABLE2[COLUMNS[column]][place])


def nko_interval(columns, wanted):
    """First and last score of N'Ko with which all these cells come out."""
    fit = []
    for tenths in range(1001):
        gaps = [gap(column, group, tenths / 10) for column in columns for group in wanted]
        if max(gaps) < 0.0501:
            fit.append(tenths / 10)
    return fit[0], fit[-1]


def test_published_numbers():
    sums = [round(sum(column), 1) for column in zip(*groups.TABLE1.values())]
    assert sums == [586.7, 591.8, 596.3, 590.3]
    assert groups.TABLE2["Phi-3.5-mini", "-"] == (None, None, 49.02, None)
    assert groups.TABLE3 == {"Unseen": (64.0, 65.1), "Seen": (88.3, 87.6), "All": (76.1, 76.3)}
    assert all(gap(column, SEEN) < 0.0501 for column in COLUMNS)
    for column in ("gpt35", "gpt4"):
        assert gap(column, UNSEEN) < 0.0501
        assert gap(column, ALL) < 0.0501
    assert nko_interval(("zs_eng", "zs_ara", "zs_zho"), (LOW, UNSEEN, ALL)) == (25.9, 26.9)
    assert nko_interval(("gpt35", "gpt4"), (LOW,)) == (3.4, 7.8)


@pytest.mark.parametrize("name, mean", [("SEEN", 88.3), ("UNSEEN", 64.0), ("TARGETS", 76.1)])
def test_targets_of_full_supervision_give_table_3(name, mean):
    codes = getattr(groups, f"FULL_SUPERVISION_{name}")
    assert round(fmean(groups.LANGUAGES[code].xlmr_large for code in codes), 1) == mean


def test_egyptian_arabic_fits_table_3_as_well_as_yue_chinese():
    other = {*groups.FULL_SUPERVISION_UNSEEN} - {"yue_Hant"} | {"arz_Arab"}
    scores = [groups.LANGUAGES[code].xlmr_large for code in other]
    seen = [groups.LANGUAGES[code].xlmr_large for code in groups.FULL_SUPERVISION_SEEN]
    assert round(fmean(scores), 1) == 64.0
    assert round(fmean(scores + seen), 1) == 76.1


def test_authors_notes_stand_beside_the_papers_leads():
    for group, note in groups.AUTHORS_NOTES.items():
        paper = groups.TABLE1[group, "joshi5"]
        assert note.endswith(f" (paper {paper[3] - paper[0]:+.1f})")


def test_importing_groups_loads_nothing_slow_and_changes_no_signal():
    script = """
import signal, sys
before = signal.getsignal(signal.SIGINT)
sys.argv = []
import groups
assert signal.getsignal(signal.SIGINT) is before
print([name for name in ("torch", "numpy", "matplotlib", "xpe") if name in sys.modules])"""
    shown = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert shown.stdout == "[]\n", shown.stderr


@pytest.mark.parametrize("text, codes", [
    ("all", "xx_Latn eng_Latn arb_Arab zho_Hans"),
    ("enarzho", "arb_Arab eng_Latn zho_Hans"),
    ("zho_Hans, enarzho,xx_Latn", "zho_Hans arb_Arab eng_Latn xx_Latn")])
def test_names_and_codes_are_resolved_once_each_in_order(text, codes):
    available = ["xx_Latn", "eng_Latn", "arb_Arab", "zho_Hans"]
    assert groups.resolve(text, available, "mine") == codes.split()


def test_full_resolves_to_the_targets_of_full_supervision():
    resolved = groups.resolve("full", list(groups.LANGUAGES), "mine")
    assert resolved == groups.FULL_SUPERVISION_TARGETS


@pytest.mark.parametrize("text, words", [
    ("eng_Latin", ["'eng_Latin'", "mine", "eng_Latn"]),
    ("joshi", ["'joshi'", "joshi5"]),
    ("", ["''", "ace_Arab"]),
    ("joshi5", ["'deu_Latn'"])])
def test_unknown_name_is_refused_with_the_closest(text, words):
    available = [code for code in groups.LANGUAGES if code != "deu_Latn"]
    with pytest.raises(groups.InputError) as error:
        groups.resolve(text, available, "mine")
    assert all(word in str(error.value) for word in words)


def test_result_is_printed_with_own_languages_in_the_mean(capsys):
    accuracy = {"nqo_Nkoo": 30.0, "awa_Deva": 50.0, "mine": 70.0}
    groups.print_result(dict(config={"toy": True}, accuracy=accuracy))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "awa_Deva  50.0  mine  70.0  nqo_Nkoo  30.0"
    table = [line.rsplit(None, 2) for line in lines[3:-1]]
    assert [LOW, "1", "30.0%"] in table
    assert [UNSEEN, "2", "40.0%"] in table
    assert ["All tested", "3", "50.0%"] in table
    assert "mean nothing" in lines[-1]


def test_result_with_training_says_how_it_went(capsys):
    accuracy = dict.fromkeys("abcdefg", 10.0)
    groups.print_result(dict(config={}, accuracy=accuracy, dev_accuracy=81.26, seconds=12.4))
    out = capsys.readouterr().out
    assert "best dev accuracy 81.3%, 12 s of training\n" in out
    assert out.startswith("a  10.0  b  10.0  c  10.0  d  10.0  e  10.0  f  10.0\ng  10.0\n")
    assert "mean nothing" not in out


# -------------------------------------------------------------------------- Programs and their end
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("error, code, said", [
    (None, 0, ""),
    (groups.InputError("a\n  b"), 2, "me: a b\n"),
    (FloatingPointError("nan"), 1, "me: nan\n"),
    (OSError("disk"), 1, "me: disk\n"),
    (MemoryError(), 1, "me: MemoryError\n")])
def test_errors_become_one_line_and_a_code(error, code, said, capsys):
    def work():
        if error:
            raise error

    assert groups.guarded("me", work) == code
    assert capsys.readouterr().err == said


def test_a_bug_is_no_line():
    with pytest.raises(ZeroDivisionError):
        groups.guarded("me", lambda: 1 / 0)


@pytest.fixture(params=["short", "groups.py"])
def printing(request, save):
    """The command of a program that prints a little, or the tables."""
    script = "import groups; groups.as_program('groups.py'); "
    script += "raise SystemExit(groups.guarded('groups.py', lambda: print('a')))"
    table = [sys.executable, str(HERE / "groups.py"), save("a", 50.0)]
    return [sys.executable, "-c", script] if request.param == "short" else table


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_behind_the_output_is_one_line(printing):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(printing, cwd=HERE, env=BUFFERED, text=True,
                               stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 1
    assert ended.stderr == "groups.py: [Errno 28] No space left on device\n"


def test_closed_pipe_behind_the_output_is_one_line(printing):
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(printing, cwd=HERE, env=BUFFERED, text=True,
                           stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert ended.returncode == 1
    assert ended.stderr == "groups.py: [Errno 32] Broken pipe\n"


def test_program_prints_names_that_the_locale_cannot(save):
    folder = save("a", {"мова": 50.0, "\ud800": 60.0})
    command = [sys.executable, str(HERE / "groups.py"), folder]
    env = os.environ | dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    ended = subprocess.run(command, env=env, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert "мова, \\ud800".encode() in ended.stdout


WORK = {
    "sleep": "time.sleep(60)",
    "hash": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10 ** 9)",  # in C, without the interpreter
    "import": "import torch; time.sleep(60)",
}


def program(work, **options):
    """A process that has become a program named xpe.py, and has begun this work."""
    script = "import groups, hashlib, time\nprint('ready')\n"
    script = f"import sys\nsys.argv = ['some/xpe.py']\n{script}{work}"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], cwd=HERE, env=BUFFERED, text=True,
                               stdout=pipe, stderr=pipe, **options)
    assert process.stdout.readline() == "ready\n"  # piped output comes line by line
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("work", WORK)
def test_signal_ends_a_program_wherever_it_is(work, name):
    process = program(WORK[work])
    number = getattr(signal, name)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert error.startswith(f"xpe.py: stopped by {name}; ")
    assert error.endswith(" goes on with the same command\n")
    assert error.count("\n") == 1


def test_signal_that_nohup_ignores_stays_ignored():
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = program(WORK["sleep"], preexec_fn=nohup)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGHUP" not in error


def test_signal_clears_the_bar_on_a_terminal():
    controller, terminal = os.openpty()
    script = "import groups, time\ngroups.as_program('me')\nprint()\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stderr=terminal,
                               stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert os.read(controller, 1000).startswith(b"\r\x1b[Kme: stopped by SIGINT; ")


# -------------------------------------------------------------------------- The tables of groups.py
@pytest.fixture
def save(tmp_path):
    """save(name, accuracy, right, **config) leaves a run's result.json; -> the folder of all.

    A number stands for all the languages.  `right`, the answers of each sentence in order, leaves
    predictions.csv too, and then gives the accuracy.
    """
    def save(name, accuracy, right=None, **config):
        defaults = dict(method="spt", xpe_ratio=0.0, source="joshi5", target="", seed=0,
                        toy=False, steps=100, backbone="b", languages="all")
        if not isinstance(accuracy, dict):
            accuracy = dict.fromkeys(groups.LANGUAGES, accuracy)
        folder = tmp_path / name
        folder.mkdir()
        if right:
            accuracy = {code: 100 * fmean(answers) for code, answers in right.items()}
            write_predictions(folder / "predictions.csv", right)
        text = json.dumps(dict(config=defaults | config, accuracy=accuracy))
        (folder / "result.json").write_text(text)
        return str(tmp_path)
    return save


def write_predictions(path, right):
    """A run's predictions.csv: the label is always a, and predicted where the answer is right."""
    lines = ["language,row,label,predicted"]
    for code, answers in right.items():
        for row, answer in enumerate(answers):
            lines.append(f"{code},{row},a,{'a' if answer else 'b'}")
    path.write_text("\n".join(lines) + "\n")


def rows(capsys, folder, *start):
    """The cells after `start` of all printed table rows that begin with it."""
    assert groups.main([folder]) == 0
    found = []
    for line in capsys.readouterr().out.splitlines():
        cells = [text.strip() for text in line.strip("|").split("|")]
        if cells[:len(start)] == [*start]:
            found.append(cells[len(start):])
    return found


def test_mean_deviation_and_difference(save, capsys):
    save("a", 50.0)
    save("b", 52.0, seed=1)
    save("c", 57.0, seed=2)
    folder = save("d", 60.0, method="dual", xpe_ratio=0.7)
    spt = "53.0 ± 3.6 (3) · 36.0 · +17.0"  # deviations -3, -1, 4: sqrt(26 / 2) = 3.6
    dual = "60.0 (1) · 37.3 · +22.7"
    assert rows(capsys, folder, LOW, "joshi5") == [[spt, "· 36.8", dual, "· 39.1"]]
    assert rows(capsys, folder, "XPE", "seen") == [["· 41.9", "· 60.8", "", ""]]


def test_copied_run_is_not_counted_twice(save, capsys):
    save("a", 50.0)
    assert groups.main([save("b", 60.0)]) == 2
    error = capsys.readouterr().err
    assert "/a" in error and "/b" in error and error.count("\n") == 1


def test_paired_difference_without_predictions_claims_no_interval(save, capsys):
    half = {code: 54.0 for code in groups.LOW_PERFORMING[:23]}  # 4 on one half, 0 on the other: 2
    save("a", 50.0)
    save("b", 10.0, seed=1)
    save("c", 90.0, method="dual", xpe_ratio=0.7, seed=5)  # no seed in common: no row
    folder = save("x", dict.fromkeys(groups.LANGUAGES, 50.0) | half, method="xpe")
    missing = "no interval: predictions.csv is missing"
    (low,) = rows(capsys, folder, "XPE - SPT", "joshi5", LOW)
    assert low == ["+2.0", f"s0 +2.0; {missing}", "+2.03 ± 1.34 (paper +3.1)"]
    (seen,) = rows(capsys, folder, "XPE - SPT", "joshi5", SEEN)
    assert seen[:2] == ["+0.0", f"s0 +0.0; {missing}"]
    assert rows(capsys, folder, "DUAL-70 - SPT") == []


@pytest.mark.parametrize("source", ["seen", "seen,eng_Latn"])
def test_no_paired_difference_where_a_group_holds_a_source(source, save, capsys):
    save("s", 50.0, source=source)
    folder = save("z", 50.0, source=source, method="xpe")
    found = rows(capsys, folder, "XPE - SPT", source)
    assert [cells[0] for cells in found] == [LOW, UNSEEN]
    assert {cells[1] for cells in found} == {"+0.0"}


def test_interval_spans_the_seeds(save, capsys):
    codes = groups.TARGET_GROUPS[SEEN]
    for seed, lead in ((0, 1), (1, 0)):
        save(f"s{seed}", {}, dict.fromkeys(codes, [0, 0, 0, 0]), seed=seed)
        folder = save(f"x{seed}", {}, dict.fromkeys(codes, [lead] * 4), seed=seed, method="xpe")
    (seen,) = rows(capsys, folder, "XPE - SPT", "joshi5", SEEN)
    assert seen[:2] == ["+50.0 [+0.0, +100.0]", "s0 +100.0, s1 +0.0"]


def test_with_four_seeds_the_interval_stands_alone(save, capsys):
    codes = groups.TARGET_GROUPS[SEEN]
    for seed in range(4):
        save(f"s{seed}", {}, dict.fromkeys(codes, [0, 1]), seed=seed)
        right = dict.fromkeys(codes, [1, 1])
        folder = save(f"d{seed}", {}, right, seed=seed, method="dual", xpe_ratio=0.3)
    (seen,) = rows(capsys, folder, "DUAL-30 - SPT", "joshi5", SEEN)
    assert seen == ["+50.0 [+0.0, +100.0]", "4 seeds", ""]  # of two sentences, one leads


@pytest.mark.parametrize("leads, half", [
    ([[[1] * 102 + [0] * 102]] * 46, 1.96 * 50 / 204 ** 0.5),  # half of the sentences, shared
    ([[[1] * 204]] * 23 + [[[0] * 204]] * 23, 1.96 * 50 / 46 ** 0.5),  # half of the languages
    ([[[1] * 4] * 10 + [[0] * 4] * 10] * 3, 1.96 * 50 / 20 ** 0.5),  # half of the seeds
    ([[[1, 0] * 8]] * 20 + [[[1, 0] * 32]] * 20, 50 * 1.96 * (1 / 64 + 1 / 256) ** 0.5)])
def test_interval_by_hand(leads, half):
    low, high = groups.bootstrap([np.array(lead) for lead in leads])
    assert abs(low - (50 - half)) < 0.12 * half
    assert abs(high - (50 + half)) < 0.12 * half


def test_interval_of_a_lead_everywhere_is_a_point():
    leads = [np.ones((3, 4)), np.ones((3, 7))]
    assert groups.bootstrap(leads).tolist() == pytest.approx([100, 100])


@pytest.mark.parametrize("change, word", [
    (("en,0,a,a", "en,0,a,b"), "another accuracy of en"),
    (("en,1,", "en,2,"), "en: row 2, should be 1"),
    (("en,1,a,b\n", ""), "another accuracy of en"),
    (("en,1,a,b", "en,1,a"), "ValueError"),
    (("en,", "de,"), "KeyError"),
    (("en,0", "en,\udcff"), "Unicode")])
def test_predictions_of_another_run_are_refused(change, word, save, tmp_path, capsys):
    save("a", {}, {"en": [1, 0]})
    path = tmp_path / "a/predictions.csv"
    path.write_text(path.read_text().replace(*change), errors="surrogateescape")
    (run,) = groups.load_runs(tmp_path)
    with pytest.raises(groups.InputError) as error:
        run.answers
    assert str(path) in str(error.value)
    assert word in str(error.value)


def test_settings_are_kept_apart_and_languages_must_be_whole(save, capsys):
    save("a", 50.0)
    save("b", 60.0, seed=1, steps=200)
    save("t", 1.0, seed=2, steps=200, toy=True)
    folder = save("c", dict.fromkeys(groups.UNSEEN, 70.0), seed=3, languages="some")
    cells = [row[0] for row in rows(capsys, folder, ALL, "joshi5")]
    assert cells == [
        "50.0 (1) · 68.7 · -18.7",
        "60.0 (1) · 68.7 · -8.7",
        "1.0 (1) · 68.7 · -67.7"]
    assert rows(capsys, folder, UNSEEN, "joshi5")[0][0] == "60.0 ± 14.1 (2) · 56.0 · +4.0"

    groups.main([folder])
    out = capsys.readouterr().out
    assert "follow 3 times" in out
    assert "toy runs" in out
    assert f"languages: {SEEN} 1, {ALL} 1." in out
    assert "## zero-shot steps=200, zero-shot toy=False" in out


def test_encoders_of_one_name_are_kept_apart(save, capsys):
    folder = save("a", 50.0)
    save("b", 60.0, seed=1)
    path = Path(folder) / "b/result.json"
    path.write_text(json.dumps(read_json(path) | {"digests": {"encoder": "another"}}))
    cells = [row[0] for row in rows(capsys, folder, ALL, "joshi5")]
    assert cells == ["50.0 (1) · 68.7 · -18.7", "60.0 (1) · 68.7 · -8.7"]


def test_full_supervision(save, capsys):
    kab, yue = 39.5, 88.9  # SIB-200's published accuracies
    full = dict(method="full", xpe_ratio=None, steps=9)
    save("f", {"kab_Latn": 40.5, "yue_Hant": 0.0}, source="kab_Latn", **full)
    save("e", 60.0, source="eng_Latn", **full)  # beside SIB-200's zero-shot from English
    dual = dict(method="dual", xpe_ratio=0.7, steps=7)
    for seed, up in ((0, 1.0), (1, 3.0)):  # seed 2 lacks yue_Hant: not in the deviation
        save(f"k{seed}", {"kab_Latn": kab + up}, target="kab_Latn", seed=seed,
             init_from=f"s{seed}", **dual)
        save(f"y{seed}", {"yue_Hant": yue + up}, target="yue_Hant", seed=seed,
             init_from=f"s{seed}", **dual)
    folder = save("k2", {"kab_Latn": kab + 8}, target="kab_Latn", seed=2, init_from="s2", **dual)
    assert rows(capsys, folder, "SIB-200", "eng_Latn")[0][1] == "60.0 (1) · 54.0 · +6.0"
    kabyle = "40.5 (1) · 39.5 · +1.0"
    assert rows(capsys, folder, "Unseen", "Full") == [["1 of 23", kabyle, "64.0"]]
    both = "67.2 ± 1.4 (2) · 64.2 · +3.0"
    assert rows(capsys, folder, "All", "DUAL-70") == [["2 of 46", both, "76.3"]]


def test_own_languages_have_a_table(save, capsys):
    save("a", {"xx": 50.0, "yy|y": 60.0})
    save("b", {"xx": 60.0, "yy|y": 70.0}, seed=1)
    save("c", {"xx": 90.0}, seed=2, method="xpe", xpe_ratio=1.0)  # others: never averaged
    folder = save("d", {"eng_Latn": 90.0}, seed=3)
    assert groups.main([folder]) == 0
    table = capsys.readouterr().out.split("### Own languages\n\n")[1].splitlines()[2:]
    assert [" ".join(line.split()) for line in table] == [
        "| SPT | joshi5 | | xx, yy\\|y | 60.0 ± 7.1 (2) |",
        "| XPE | joshi5 | | xx | 90.0 (1) |"]


def test_csv_has_a_row_per_run_and_language(save, capsys, tmp_path):
    path = tmp_path / "x.csv"
    groups.main([save("a", {"nqo_Nkoo": 30.0, "mine": 9.5}), "--csv", str(path)])
    first, own = csv.DictReader(path.open(encoding="utf-8"))
    name = groups.LANGUAGES["nqo_Nkoo"].name
    assert list(first.values())[6:] == ["nqo_Nkoo", name, "0", "1", "30.0"]
    start = ["a", "SPT", "0.0", "joshi5", "", "0"]
    assert list(own.values()) == [*start, "mine", "", "0", "0", "9.5"]


def drawn(monkeypatch, capsys, folder):
    """The figure that --plot saves."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    kept = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: kept.append(self))
    code = groups.main([folder, "--plot", "x.png"])
    assert code == 0, capsys.readouterr().err
    return kept[0]


def test_plot_draws_every_language_and_says_of_what(save, capsys, monkeypatch):
    save("a", 50.0, backbone="hub/enc")
    save("b", 60.0, backbone="hub/enc", seed=1)
    folder = save("c", 70.0, backbone="hub/enc", method="dual", xpe_ratio=0.7)
    figure = drawn(monkeypatch, capsys, folder)
    title = figure.get_suptitle()
    assert "joshi5: enc, 100 steps, 2 seeds (0, 1)\n" in title
    codes = [tick.get_text() for axes in figure.axes for tick in axes.get_xticklabels()]
    assert codes == [*groups.SEEN, *groups.UNSEEN]  # all alike: by code
    for axes in figure.axes:
        lines = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
        guessing = lines["always the most frequent label"]
        assert (lines["SPT"], lines["DUAL-70"], guessing) == (55.0, 70.0, 25.0)


def test_plot_draws_one_setting_and_says_which(save, capsys, monkeypatch):
    save("a", 50.0)
    save("b", 52.0, seed=1)
    folder = save("c", 60.0, seed=2, steps=200)
    figure = drawn(monkeypatch, capsys, folder)
    assert "100 steps, 2 seeds (0, 1)\nzero-shot steps=100\nBold" in figure.get_suptitle()


def test_plot_draws_own_languages_without_what_is_not_theirs(save, capsys, monkeypatch):
    figure = drawn(monkeypatch, capsys, save("a", {"xx": 50.0, "yy": 20.0}))
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Own languages"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["yy", "xx"]
    assert "always the most frequent label" not in [line.get_label() for line in axes.lines]


def one_line_of(capsys, *argv):
    """The single line on standard error with which these arguments are refused."""
    assert groups.main([*map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("groups.py: ")
    return error


@pytest.mark.parametrize("text", [
    "{", "[]", "5", "null", "[1]", '{"config": {}}', '{"config": [], "accuracy": {}}', "\udcff"])
def test_other_files_than_results_are_refused(text, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text(text, errors="surrogateescape")
    assert "a/result.json" in one_line_of(capsys, tmp_path)


@pytest.mark.parametrize("accuracy", [
    {}, {"en": "50"}, {"en": None}, {"en": float("nan")}, {"en": -1}, {"en": 1e999}, {"en": [5]}])
def test_results_with_odd_accuracies_are_refused(accuracy, save, capsys):
    assert "a/result.json" in one_line_of(capsys, save("a", accuracy))


@pytest.mark.parametrize("key, value", [
    ("method", None), ("method", ["spt"]), ("source", 5), ("seed", [1]), ("seed", None),
    ("target", {}), ("xpe_ratio", "x"), ("xpe_ratio", float("inf"))])
def test_results_with_odd_settings_are_refused(key, value, save, capsys):
    config = {"method": "dual", key: value}
    assert "a/result.json" in one_line_of(capsys, save("a", 50.0, **config))


def test_wrong_arguments_are_one_line(save, tmp_path, capsys):
    assert "no finished run" in one_line_of(capsys, tmp_path)
    assert ".svg" in one_line_of(capsys, tmp_path, "--plot", "x.jpg")
    assert "--bogus" in one_line_of(capsys, tmp_path, "--bogus")
    folder = save("a", 50.0, method="full")
    capsys.readouterr()
    assert "no zero-shot run" in one_line_of(capsys, folder, "--plot", "x.png")
