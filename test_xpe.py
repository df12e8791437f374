"""The tests, offline and on the CPU: each compares with what others wrote, or with constants checked by eye.

Optimizer and schedule are compared step by step with transformers'; a prompt of length 0 with transformers'
plain classifier; adapters with PEFT, and with the released layout computed by hand; the prompt's order and
counts, rates and error lines with constants; a cached prompt with the encoded one; a batch with its sentences
one by one; a run with itself repeated, and with itself killed and gone on with, bit for bit; groups.py with
the paper's numbers.
"""
import ast
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

# Before anything reads them.  One thread: in models as tiny as these, two would mostly wait for each other.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import groups
import xpe

HERE = Path(__file__).parent
METHODS = ("spt", "dual", "xpe")
SHORT = "--source eng_Latn --languages eng_Latn,fra_Latn,nqo_Nkoo --steps".split()
WORDS = {"a": "topic1 topic2 topic3", "b": "topic11 topic12 topic13", "c": "topic21 topic22 topic23"}
TEXTS = ["topic1 topic2 filler3", "topic11", "filler1 topic21 topic22 foreign3 filler9 topic25"]
HEAD = "base_model.classifier."
LOW, UNSEEN, SEEN, ALL = groups.TARGET_GROUPS

# ------------------------------------------------------------------------------------------------- Helpers

def launch(out, *argv):
    """A toy run from the command line; -> its folder."""
    assert xpe.main(["--toy", *map(str, argv), "--out", str(out)]) == 0
    return next(Path(out).iterdir())

def refused(capsys, words, *argv):
    """The command ends with exit code 2 and one line on standard error, which holds all of `words`."""
    capsys.readouterr()
    code, error = xpe.main(["--toy", *map(str, argv)]), capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "Traceback" not in error
    assert all(word in error for word in words), error
    return error

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A local --backbone: a tiny XLM-R with a head for 7 labels, and its tokenizer, saved by transformers."""
    folder, (backbone, tokenizer) = tmp_path_factory.mktemp("tiny"), xpe.load_backbone("toy")
    config = transformers.XLMRobertaConfig.from_dict(backbone.config.to_dict() | dict(num_labels=7))
    model = transformers.XLMRobertaForSequenceClassification(config)
    model.roberta.load_state_dict(backbone.state_dict())
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """{method: folder of a finished run on the tiny backbone}; languages of each group are tested."""
    codes = "fra_Latn,ita_Latn,pol_Latn,awa_Deva,fao_Latn,nqo_Nkoo,dzo_Tibt"
    argv = f"--source enarzho --languages {codes} --steps 120 --lr 6e-3 --prompt-lr 0.1".split()
    argv += ["--backbone", tiny, "--method"]
    return {method: launch(tmp_path_factory.mktemp(method), *argv, method) for method in METHODS}

@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of 20 epochs."""
    return launch(tmp_path_factory.mktemp("whole"), *SHORT, 100)

def await_checkpoint(folder, process):
    """Wait until a run's first checkpoint is there, its process has ended, or two minutes are over."""
    until = time.time() + 120
    while not (folder / "checkpoint.pt").exists() and process.poll() is None and time.time() < until:
        time.sleep(0.01)

def result(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))

def outcome(folder):
    """What must be equal to the last bit in two runs alike: prompt and head, accuracies, the curve."""
    adapter = (folder / "adapter/adapter_model.safetensors").read_bytes()
    return adapter, result(folder)["accuracy"], result(folder)["dev_curve"]

def files(folder):
    """{path: (content, time of last change)} of everything below a folder."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).rglob("*") if p.is_file()}

def write_tsv(path, rows):
    """Rows (label, text) as SIB-200 has them: CSV with tabs, quoted where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([("index_id", "category", "text"), *[(i, *row) for i, row in enumerate(rows)]])

@pytest.fixture
def own(tmp_path):
    """A data folder with languages xx (labels a, b) and yy (labels b, c), unknown to groups.py."""
    for code, labels in (("xx", "ab"), ("yy", "bc")):
        for split in ("train", "dev", "test"):
            write_tsv(tmp_path / f"own/{code}/{split}.tsv", [(label, WORDS[label]) for label in labels * 4])
    return tmp_path / "own"

def model_of(method="dual", pool="first", labels=7):
    """A model with a random prompt of 6 vectors around the toy's backbone, in eval mode."""
    torch.manual_seed(0)
    prompt = xpe.build_prompt(method, 6, 64, 0.5)
    return xpe.PromptedClassifier(xpe.load_backbone("toy")[0], prompt, labels, pool).eval()

def logits(model, *texts):
    """Logits of ours (B, C), or of a model of transformers or PEFT, on right-padded texts."""
    e = xpe.load_backbone("toy")[1](list(texts or TEXTS), padding=True, return_tensors="pt")
    out = model(input_ids=e["input_ids"], attention_mask=e["attention_mask"])
    return getattr(out, "logits", out)

def by_hand(backbone, prompt, head, texts, position=0):
    """Logits of [prompt | text], one text at a time, from a backbone and {name: tensor} of a head."""
    tokenizer, states = xpe.load_backbone("toy")[1], []
    for text in texts:
        words = backbone.get_input_embeddings()(torch.tensor(tokenizer(text)["input_ids"]))          # (T, H)
        states.append(backbone(inputs_embeds=torch.cat([prompt, words])[None]).last_hidden_state[0, position])
    hidden = torch.tanh(torch.stack(states) @ head["dense.weight"].T + head["dense.bias"])           # (B, H)
    return hidden @ head["out_proj.weight"].T + head["out_proj.bias"]                                # (B, C)

def close(a, b, tolerance):
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance

# ---------------------------------------------------------------------------------- Optimizer and schedule

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("scale", [1.0, 1e-15])    # of gradients: 1e-15 is where eps counts
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_transformers(decay, scale, dtype, tolerance):
    torch.manual_seed(0)
    shapes = (5, 3), (4,), (2, 3, 4), (1, 6)
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = xpe.Adafactor(ours, lr=5e-3, weight_decay=decay)
    b = transformers.optimization.Adafactor(theirs, lr=5e-3, weight_decay=decay, scale_parameter=False,
                                            relative_step=False, warmup_init=False, beta1=None)
    for step in range(50):
        if step == 25:                             # a new one goes on from the saved state
            saved, a = a.state_dict(), xpe.Adafactor(ours, lr=123.0)
            a.load_state_dict(saved)
        for p, q in zip(ours, theirs):             # ten times as large a gradient is clipped
            p.grad = q.grad = torch.randn_like(p) * scale * (10 if step % 9 == 8 else 1)
        a.step(), b.step()
        assert all(close(p, q, tolerance) for p, q in zip(ours, theirs)), step

def test_adafactor_takes_a_closure():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = xpe.Adafactor([p], lr=0.1)

    def closure():
        loss = (p - 1).square().sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 3 and close(p, torch.full((3,), 0.1), 1e-7)

@pytest.mark.parametrize("warmup, total, cycles", [(0, 30, 1), (3, 30, 2), (10, 97, 3), (2400, 24_000, 2)])
def test_schedule_is_transformers(warmup, total, cycles):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, total, cycles)
    factor = theirs.lr_lambdas[0]
    for step in range(total + 3):
        assert abs(xpe.cosine_with_restarts(step, warmup, total, cycles) - factor(step)) <= 1e-12, step

# --------------------------------------------------------------------------------------------- The prompts

@pytest.mark.parametrize("ratio, encoded", [(0.3, 6), (0.48, 10), (0.7, 14), (0.01, 1), (0.99, 19)])
def test_ratio_gives_the_number_of_encoded_vectors(ratio, encoded):
    prompt = xpe.build_prompt("dual", 20, 8, ratio)
    assert prompt.encoded.pseudo_prompt.shape == (encoded, 8) and prompt().shape == (20, 8)
    assert prompt.standard.vectors.shape == (20 - encoded, 8)
    pytest.raises(KeyError, xpe.build_prompt, "xep", 20, 8)          # a slip is no soft prompt

@pytest.mark.parametrize("method, rows", [("spt", "1111"), ("dual", "1122"), ("xpe", "2222")])
def test_standard_part_first_encoded_part_second(method, rows):
    prompt = xpe.build_prompt(method, 4, 3, ratio=0.5)
    for name, p in prompt.named_parameters():      # free vectors are 1; the last Linear gives 0 x + 2
        p.data.fill_(1 if name.endswith("vectors") else 2 if name.endswith("mlp.6.bias") else 0)
    assert prompt().tolist() == [[int(row)] * 3 for row in rows]

def test_encoder_treats_each_vector_alone():
    prompt, order = xpe.CrossPromptEncoder(5, 8).eval(), [3, 0, 4, 1, 2]
    before = prompt()
    prompt.pseudo_prompt.data = prompt.pseudo_prompt.data[order]
    assert close(prompt(), before[order], 1e-6) and not close(before[order], before, 1e-3)

@pytest.mark.parametrize("method, count", [("spt", 1_077_255), ("dual", 1_668_615), ("xpe", 1_668_615)])
def test_parameter_counts_for_xlm_r_large(method, count):
    large = dict(vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                 intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1)
    config = transformers.XLMRobertaConfig(**large)
    with torch.device("meta"):
        backbone = transformers.XLMRobertaModel(config, add_pooling_layer=False).requires_grad_(False)
        model = xpe.PromptedClassifier(backbone, xpe.build_prompt(method, 20, 1024, 0.7), 7)
    plain = sum(p.numel() for part in (backbone, model.head) for p in part.parameters())
    assert sum(p.numel() for p in xpe.trainable(model).values()) == count < 0.003 * plain
    assert round(plain / 1e6, 1) == 559.9

# ------------------------------------------------------------------------------------------ The classifier

def test_prompt_of_length_0_is_the_plain_classifier(tiny):
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tiny).eval()
    model = xpe.PromptedClassifier(xpe.load_backbone(tiny)[0], xpe.SoftPrompt(0, 64), 7).eval()
    model.head.load_state_dict(plain.classifier.state_dict())
    assert close(logits(model), logits(plain), 1e-6)

@pytest.mark.parametrize("pool, position", [("first", 0), ("bos", 6)])
def test_logits_and_gradient_by_hand_whatever_the_padding(pool, position):
    model = model_of(pool=pool)
    found = logits(model)
    expected = by_hand(model.backbone, model.prompt(), model.head.state_dict(), TEXTS, position)
    assert close(found, expected, 1e-6) and not close(expected[:1], expected[1:2], 1e-3)
    for p in model.prompt.parameters():
        a, b = (torch.autograd.grad(y.square().sum(), p, retain_graph=True)[0] for y in (found, expected))
        assert close(a, b, 1e-5 * b.abs().max().item()) and b.abs().max() > 0
    assert close(logits(model, TEXTS[1]), expected[1:2], 1e-6)

@pytest.mark.parametrize("method", METHODS)
def test_cached_prompt_gives_the_same_and_needs_no_encoder(method):
    model = model_of(method)
    assert torch.equal(logits(model), logits(model.cache_prompt()))
    assert [p.shape for p in model.prompt.parameters()] == [(6, 64)]

# ------------------------------------------------------------------------------------------------ Training

def test_best_epoch_is_kept_and_patience_counts_from_half_time():
    labels, cfg, model = np.array([0, 0, 1, 1]), xpe.Config(steps=8), model_of("spt")
    run, kept, waited = dict(step=0, curve=[], lr=0.0, best=None, waited=0, seconds=0.0), [], []
    epochs = [(2, 0.9, 2), (4, 0.5, 3), (5, 0.7, 3), (6, 0.6, 2), (7, 0.4, 4), (8, 0.6, 4)]
    for epoch, (run["step"], dev_loss, right) in enumerate(epochs):  # so many of the four labels are right
        model.prompt.vectors.data.fill_(epoch)
        xpe.record(run, model, cfg, 1.0, dev_loss, np.where(np.arange(4) < right, labels, 2), labels)
        kept.append(run["best"]["prompt.vectors"][0, 0].item()), waited.append(run["waited"])
    assert kept == [0, 1, 1, 1, 4, 4] and waited == [0, 0, 1, 2, 0, 1]

def test_patience_ends_a_run(tmp_path):
    short = ["--source", "eng_Latn", "--languages", "eng_Latn", "--steps", 400, "--lr", 0.3, "--patience", 1]
    curve = result(launch(tmp_path, *short))["dev_curve"]
    assert 200 <= curve[-1]["step"] < 400 and curve[-1]["dev_loss"] >= min(c["dev_loss"] for c in curve[:-1])

def test_backbone_stays_frozen(tmp_path, monkeypatch):
    seen, train = [], xpe.train

    def spy(model, *rest):
        seen.extend([model, {name: t.clone() for name, t in model.state_dict().items()}])
        return train(model, *rest)
    monkeypatch.setattr(xpe, "train", spy)
    launch(tmp_path, *SHORT, 10)
    model, before = seen
    for name, p in model.backbone.named_parameters(prefix="backbone"):
        assert p.grad is None and p.detach().numpy().tobytes() == before[name].numpy().tobytes(), name
    assert not torch.equal(model.head.dense.weight, before["head.dense.weight"])

PAPER = dict(vectors=(5e-3, 0.0), pseudo_prompt=(5e-5, 0.1), weight=(5e-5, 0.1), bias=(5e-5, 0.1))
RELEASED = dict(vectors=(5e-3, 0.0), pseudo_prompt=(5e-3, 0.0), weight=(5e-5, 0.01), bias=(5e-5, 0.0))

@pytest.mark.parametrize("recipe, method, table", [
    *[("paper", method, PAPER) for method in METHODS], ("released", "spt", RELEASED),
    ("released", "dual", RELEASED | dict(vectors=(5e-5, 0.0))), ("released", "xpe", RELEASED)])
def test_rate_and_decay_of_each_parameter(recipe, method, table):
    cfg, model = xpe.parse(["--method", method, "--recipe", recipe]), model_of(method)
    xpe.check(cfg)
    parts, names = xpe.parameter_groups(model, cfg), {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (part["lr"], part["weight_decay"]) for part in parts for p in part["params"]}
    assert found == {name: table[name.split(".")[-1]] for name in names.values() if "backbone" not in name}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_dropout_is_dropout(dtype):
    x = torch.full((1001, 301), 3.0, dtype=dtype, requires_grad=True)           # one more than 4 x 75,325
    with xpe.FastDropout():
        y = torch.nn.Dropout(0.2)(x)
        assert torch.nn.Dropout(0.2).eval()(x) is x and torch.nn.functional.dropout(x, p=0.0) is x
    y.sum().backward()
    kept = y != 0
    assert set(y.unique().tolist()) == {0.0, (x[0, 0] / 0.8).item()}
    assert torch.equal(x.grad, kept.to(dtype) * 1.25)
    lanes = kept.flatten()[:-1].view(-1, 4).double()                            # (75325, 4)
    assert (lanes.mean(0) - 0.8).abs().max() < 0.006                            # their deviation is 0.0015
    assert (torch.corrcoef(lanes.T) - torch.eye(4)).abs().max() < 0.015         # and here 0.0036

@pytest.mark.parametrize("dropout", ["on", "off"])
def test_backbones_dropout_is_fast_and_can_be_off(dropout, tmp_path, monkeypatch):
    rates, draw = [], xpe.FastDropout.dropout
    def spy(self, x, p=0.5, training=True, inplace=False):
        rates.append(p * training)
        return draw(self, x, p, training)
    monkeypatch.setattr(xpe.FastDropout, "dropout", spy)
    launch(tmp_path, "--method", "spt", *SHORT, "1", "--head-dropout", "0", "--backbone-dropout", dropout)
    assert sorted(set(rates)) == ([0.0, 0.1] if dropout == "on" else [0.0])

@pytest.mark.parametrize("argv, there, expected", [
    ("", True, ("cuda:0", "bf16")), ("", False, ("cpu", "fp32")), ("--device cpu", True, ("cpu", "fp32")),
    ("--dtype fp32", True, ("cuda:0", "fp32")), ("--method full", True, ("cuda:0", "fp32"))])
def test_auto_is_a_gpu_in_bf16_where_there_is_one(argv, there, expected, monkeypatch):
    class Probe:                                   # what torch.empty gives on a machine with a GPU
        def __init__(self, size, device):
            self.device = {"cuda": "cuda:0"}.get(device, device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there), monkeypatch.setattr(torch, "empty", Probe)
    xpe.check(cfg := xpe.parse(argv.split()))
    assert (cfg.device, cfg.dtype) == expected

def test_epoch_batches_cover_every_row_once():
    lengths = np.random.default_rng(0).integers(5, 60, size=1001)
    a, b, again = ([list(rows) for rows in xpe.epoch_batches(lengths, 32, 0, epoch)] for epoch in (0, 1, 0))
    assert sorted(sum(a, [])) == sorted(sum(b, [])) == list(range(1001)) and a == again != b
    assert sorted(map(len, a)) == [9] + [32] * 31
    assert fmean(max(lengths[rows]) - min(lengths[rows]) for rows in a) < 20             # of 54; unsorted: 51

def test_predictions_keep_the_order_and_equal_one_by_one():
    model, codes, labels = model_of(), ["eng_Latn", "nqo_Nkoo"], list(groups.LABELS)
    rows = xpe.load_rows("toy", codes, "test", labels)
    split = xpe.encode(rows, labels, xpe.load_backbone("toy")[1], torch.device("cpu"), 32)
    texts, names = (sum(both, []) for both in zip(*[xpe.load_language("toy", c, "test") for c in codes]))
    expected = by_hand(model.backbone, model.prompt(), model.head.state_dict(), texts)
    assert close(xpe.predict(model, split, tokens=200), expected, 1e-6)
    accuracy, loss, guess = xpe.evaluate(model, split)
    right = [labels[i] == name for i, name in zip(expected.argmax(1), names)]
    assert list(guess) == expected.argmax(1).tolist()
    assert accuracy == pytest.approx(dict(zip(codes, (100 * fmean(right[:35]), 100 * fmean(right[35:])))))

@pytest.mark.parametrize("method", METHODS)
def test_toy_learns_what_the_backbone_knows(runs, method):
    report = result(runs[method])
    seen, unseen, low = (report["groups"][name] for name in (SEEN, UNSEEN, LOW))
    assert seen >= 80 and seen > unseen > low
    assert {"config", "versions", "seconds", "trainable_parameters", "dev_accuracy"} < report.keys()
    assert len(report["accuracy"]) == 7 and report["dev_curve"][-1]["step"] == 120
    assert len((runs[method] / "log.csv").read_text().splitlines()) == 1 + len(report["dev_curve"])
    for c in report["dev_curve"]:                  # the last step's, with warm-up in the first 12 of 120
        assert c["lr"] == pytest.approx(6e-3 * xpe.cosine_with_restarts(c["step"] - 1, 12, 120))

# --------------------------------------------------------------------------- Repeated, stopped, gone on with

@pytest.mark.parametrize("steps", [0, 15])         # 0: the seed decides the start, not only the batches
def test_one_seed_twice_is_bit_identical(steps, tmp_path):
    a, b, c = (outcome(launch(tmp_path / out, *SHORT, steps, "--seed", out[1])) for out in ("a3", "b3", "c4"))
    assert a == b and a[0] != c[0]

@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_interrupted_run_ends_as_if_it_never_was(number, code, whole, tmp_path):
    argv, folder = [*SHORT, "100", "--out", str(tmp_path)], tmp_path / whole.name
    process = subprocess.Popen([sys.executable, str(HERE / "xpe.py"), "--toy", *argv], text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    await_checkpoint(folder, process)
    process.send_signal(number)
    assert "Traceback" not in process.communicate()[1] and process.returncode == code
    assert (folder / "checkpoint.pt").exists() and not (folder / "result.json").exists()
    assert outcome(launch(tmp_path, *SHORT, 100)) == outcome(whole)

def test_finished_run_is_reported_not_repeated(whole, capsys):
    before = files(whole)
    launch(whole.parent, *SHORT, 100)
    out = capsys.readouterr().out
    assert "fra_Latn" in out and "synthetic" in out and files(whole) == before

def test_folder_of_another_config_is_refused(whole, capsys):
    before = files(whole)
    error = refused(capsys, ["100 there, 99 here"], *SHORT, 99, "--batch-size", 7, "--out", whole.parent)
    assert re.findall(r"(\w+) \(", error) == ["steps", "batch_size"] and files(whole) == before

class Hostile:
    """Unpickling it creates a file."""
    def __reduce__(self):
        return open, (os.environ["HOSTILE"], "w")

@pytest.mark.parametrize("content", ["cut", "foreign", "hostile", "other model"])
def test_unreadable_checkpoint_is_refused(content, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    path = tmp_path / whole.name / "checkpoint.pt"
    path.parent.mkdir()
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    torch.save({"foreign": {"weights": 1}, "hostile": Hostile(), "cut": state,
                "other model": state | dict(model={"a": torch.zeros(1)})}[content], path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    before = files(tmp_path)
    refused(capsys, ["checkpoint.pt"], *SHORT, 100, "--out", tmp_path)
    assert files(tmp_path) == before

def test_non_finite_loss_names_step_and_languages(own, tmp_path, monkeypatch, capsys):
    real, evaluated = torch.nn.functional.cross_entropy, []

    def poisoned(output, y, **_):                  # from the second epoch on, for label a: that is xx alone
        evaluated.extend([1] * (len(y) > 1))
        return real(output, y) * (float("nan") if evaluated and y.tolist() == [0] else 1.0)
    argv = ["--data", own, "--source", "xx,yy", "--batch-size", 1, "--steps", 40]        # an epoch is 16
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", poisoned)
    assert xpe.main(["--toy", *map(str, argv), "--out", str(tmp_path / "out")]) == 1
    error, folder = capsys.readouterr().err, next((tmp_path / "out").iterdir())
    assert 17 <= int(re.search(r"step (\d+)", error)[1]) <= 32
    assert error.count("\n") == 1 and re.search(r"\bxx\b", error) and not re.search(r"\byy\b", error)
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert kept["log"]["step"] == 16 and all(t.isfinite().all() for t in kept["model"].values())
    monkeypatch.undo()
    assert result(launch(tmp_path / "out", *argv))["dev_curve"][-1]["step"] == 40

def test_non_finite_dev_loss_keeps_the_checkpoint(tmp_path, capsys):
    rates = ["--lr", "1e30", "--prompt-lr", "1e30", "--warmup", "0"]  # one step breaks the weights
    assert xpe.main(["--toy", *SHORT, "4", "--batch-size", "1000", "--out", str(tmp_path), *rates]) == 1
    assert "dev loss" in capsys.readouterr().err and not list(tmp_path.glob("*/checkpoint.pt"))

def test_start_is_not_broadcast(tmp_path, capsys):
    short = ["--toy", *SHORT, "0", "--method", "spt", "--out", str(tmp_path / "a"), "--prompt-length"]
    assert xpe.main([*short, "1"]) == 0
    start = str(next((tmp_path / "a").iterdir()))
    assert xpe.main([*short, "20", "--out", str(tmp_path / "b"), "--init-from", start]) == 2
    assert "does not fit" in capsys.readouterr().err

# ------------------------------------------------------------- Sequential transfer, baseline, the whole grid

GRID = "bash", str(HERE / "run_all.sh")

def test_target_starts_where_the_source_run_ended(tmp_path, monkeypatch):
    codes, source = ["lao_Laoo", "kab_Latn"], tmp_path / "a/toy-dual70-eng_Latn-s0"
    argv = ["--toy", *SHORT, "60", "--target", ",".join(codes), "--target-steps", "0"]
    argv += ["--languages", ",".join(codes)]
    for out, start in (("a", []), ("b", ["--init-from", str(source)])):         # b: no second source run
        assert xpe.main([*argv, "--out", str(tmp_path / out), *start]) == 0
        assert len(list((tmp_path / out).iterdir())) == (3 if out == "a" else 2)
        for code in codes:
            target = result(tmp_path / out / f"toy-dual70-eng_Latn-{code}-s0")
            assert target["accuracy"] == {code: result(source)["accuracy"][code]}
            settings = dict(steps=0, warmup=0.05, dropout=0.0, patience=30, target=code)
            assert settings.items() <= target["config"].items()
    assert result(source)["accuracy"]["lao_Laoo"] > result(source)["accuracy"]["kab_Latn"]
    before = files(tmp_path)                       # the same runs by other paths, and in a folder that moved
    monkeypatch.chdir(tmp_path)
    assert xpe.main([*argv, "--out", "./b/", "--init-from", "a/toy-dual70-eng_Latn-s0/"]) == 0
    Path("a").rename("moved")
    assert xpe.main([*argv, "--out", "moved"]) == 0
    assert {str(p).replace("moved", "a"): what for p, what in files(tmp_path).items()} == {
        str(p): what for p, what in before.items()}

def test_target_keeps_the_labels_of_its_source(own, tmp_path, capsys):
    argv = ["--toy", "--data", str(own), "--source", "xx", "--target", "yy", "--steps", "20"]
    argv += ["--target-steps", "0", "--out", str(tmp_path / "first")]
    refused(capsys, ["yy/train.tsv:3", "'c'"], *argv[1:], "--languages", "xx")   # its rows are b, c, b, ...
    for split in ("train", "dev", "test"):
        write_tsv(own / f"yy/{split}.tsv", [("b", WORDS["b"])] * 4)              # no a
    assert xpe.main([*argv, "--languages", "xx,yy", "--out", str(tmp_path / "again")]) == 0
    source, target = (tmp_path / f"again/toy-dual70-xx{name}-s0" for name in ("", "-yy"))
    assert result(target)["accuracy"] == {"yy": result(source)["accuracy"]["yy"]}
    assert json.loads((target / "adapter/xpe.json").read_text())["labels"] == ["a", "b"]

def test_init_from_a_run_that_does_not_fit_is_refused(tmp_path, capsys):
    folder = launch(tmp_path, *SHORT, "1")
    argv = ["--target", "kab_Latn", "--init-from", folder, "--out", tmp_path / "b"]
    refused(capsys, ["--init-from", "--source eng_Latn"], *argv)
    refused(capsys, ["--init-from", "--pool first"], *argv, "--source", "eng_Latn", "--pool", "bos")
    (folder / "result.json").unlink()
    refused(capsys, ["--init-from", "must be finished"], *argv, "--source", "eng_Latn")
    assert not (tmp_path / "b").exists()

def test_target_learns_from_its_own_sentences_alone(tmp_path, monkeypatch):
    used, train = [], xpe.train
    def spy(model, data, dev, *rest):
        used.append([set(split.languages) for split in (data, dev)])
        return train(model, data, dev, *rest)
    monkeypatch.setattr(xpe, "train", spy)
    assert xpe.main(["--toy", *SHORT, "20", "--target", "awa_Deva,kab_Latn", "--out", str(tmp_path)]) == 0
    assert used == [[{code}] * 2 for code in ("eng_Latn", "awa_Deva", "kab_Latn")]
    names = [f"toy-dual70-eng_Latn{code}-s0" for code in ("", "-awa_Deva", "-kab_Latn")]
    start, *targets = (outcome(tmp_path / name) for name in names)
    assert len({adapter for adapter, *_ in (start, *targets)}) == 3
    assert [curve[-1]["step"] for *_, curve in targets] == [75, 75]              # the toy's --target-steps

def test_full_fine_tuning_trains_the_backbone_and_no_prompt(tmp_path, monkeypatch):
    kept, train = [], xpe.train
    monkeypatch.setattr(xpe, "train", lambda model, *a: kept.append(model) or train(model, *a))
    folder = launch(tmp_path, "--method", "full", *SHORT, "30", "--lr", "1e-3")
    start = dict(xpe.load_backbone("toy")[0].named_parameters())
    moved = {name for name, p in kept[0].backbone.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(start) and len(kept[0].prompt()) == 0
    assert result(folder)["trainable_parameters"] == sum(p.numel() for p in kept[0].parameters())
    assert sorted(path.name for path in folder.iterdir()) == ["log.csv", "result.json"]

def shell(folder, *command, path="", **settings):
    """A process of a command line, in a session of its own, where `python` is this one."""
    path = os.pathsep.join([path, str(Path(sys.executable).parent), os.environ["PATH"]]).lstrip(os.pathsep)
    theirs = "SEEDS STEPS BACKBONE DATA OUT JOBS SLURM_ARRAY_TASK_ID SLURM_SUBMIT_DIR".split()
    outer = {name: value for name, value in os.environ.items() if name not in theirs}
    return subprocess.Popen(command, cwd=folder, env=outer | settings | dict(PATH=path), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

def test_grid_lists_the_runs_of_the_paper(tmp_path):
    lines = shell(tmp_path, *GRID, "--list", "--dtype", "bf16").communicate()[0].splitlines()
    configs = [xpe.parse(shlex.split(line)[2:]) for line in lines]
    for cfg in configs:
        xpe.check(cfg)
    table1, table3 = configs[:120], [cfg for cfg in configs if cfg.target]
    baselines = [cfg for cfg in configs if cfg.method == "full"]
    assert len({xpe.claim_folder(cfg)[0] for cfg in configs}) == len(configs) == 120 + 46 * 6 + (46 + 3) * 6
    assert {(cfg.method, cfg.xpe_ratio, cfg.source, cfg.seed) for cfg in table1} == {
        (*method, source, seed) for method in (("spt", 0.0), ("dual", 0.3), ("dual", 0.7), ("xpe", 1.0))
        for source in groups.SOURCES for seed in range(10)}
    assert {(cfg.method, cfg.source) for cfg in table3} == {("dual", "joshi5")} and len(table3) == 46 * 6
    assert {cfg.steps for cfg in [*table1, *table3]} == {24_000} and len(baselines) == (46 + 3) * 6
    assert {cfg.target_steps for cfg in table3} == {cfg.steps for cfg in baselines} == {6_000}
    assert {cfg.dtype for cfg in table1 + table3} == {"bf16"} and {cfg.dtype for cfg in baselines} == {"fp32"}
    assert not list(tmp_path.iterdir())
    for steps, flag in zip("33333m", ("--steps", "--seed=1", "--out", "--method", "--source=seen", "--clip")):
        process = shell(tmp_path, *GRID, "--list", flag, "3", STEPS=steps)       # the grid sets them itself
        assert process.communicate()[1].startswith("run_all.sh: ") and process.returncode == 2

def test_killed_grid_goes_on_and_fills_the_tables(tmp_path, capsys):
    lines = shell(tmp_path, *GRID, "--list", "--toy", STEPS="60").communicate()[0].splitlines()
    script = lines[0] + "&&" + lines[3]            # two cells: SPT and XPE, from Joshi5
    first, second = tmp_path / "runs/toy-spt-joshi5-s0", tmp_path / "runs/toy-xpe-joshi5-s0"
    process = shell(tmp_path, "bash", "-c", script)
    await_checkpoint(second, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = files(first)
    assert (first / "result.json").exists() and not (second / "result.json").exists()
    again = shell(tmp_path, "bash", "-c", script)
    assert "going on from step" in again.communicate()[0] and again.returncode == 0 and files(first) == before
    means = [f"{result(folder)['groups'][UNSEEN]:.1f} (1)" for folder in (first, second)]
    cells = rows(capsys, str(tmp_path / "runs"), UNSEEN, "joshi5")[0]
    assert [cell.split(" · ")[0] or cell for cell in cells] == [means[0], "· 56.4", "· 57.6", means[1]]

def test_grid_fails_loudly_after_the_other_runs(tmp_path):
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin/python"                 # runs nothing, and fails in one of the 46 runs
    stub.write_text(f"""#!/bin/sh
case "$*" in
  *xpe.py*enarzho*"--seed 1") echo "$*" >> ran; case "$*" in *spt*) exit 1 ;; esac ;;
  *xpe.py*) echo "$*" >> ran ;;
  *) exec {sys.executable} "$@" ;;
esac""")
    stub.chmod(0o755)
    process = shell(tmp_path, *GRID, "--toy", path=str(stub.parent))
    error = process.communicate()[1]
    ran = (tmp_path / "ran").read_text().splitlines()
    assert process.returncode == 1 and len(ran) == 46 and error.count("FAILED") == 1 and "spt" in error
    shell(tmp_path, *GRID, "--toy", path=str(stub.parent), SLURM_ARRAY_TASK_ID="46").communicate()
    assert (tmp_path / "ran").read_text().splitlines()[46:] == ran[-1:]
    process = shell(tmp_path, *GRID, "--toy", SLURM_ARRAY_TASK_ID="47")
    assert "46 lines" in process.communicate()[1] and process.returncode

# ----------------------------------------------------------------------------------------------- Bad input

@pytest.mark.parametrize("argv, words", [
    ("--source eng_Lat", ["'eng_Lat'", "eng_Latn"]),
    ("--source joshi", ["'joshi'", "joshi5"]),
    ("--source eng_Latn --languages fra_Latn,french", ["'french'"]),
    ("--method dul", ["'dul'", "dual"]),
    ("--xpe-ratio 0", ["--xpe-ratio"]),
    ("--xpe-ratio 1", ["--xpe-ratio"]),
    ("--xpe-ratio 1.5", ["--xpe-ratio"]),
    ("--method spt --xpe-ratio 0.5", ["--xpe-ratio", "spt"]),
    ("--prompt-length 1", ["--prompt-length", "2"]),
    ("--prompt-length 100", ["100", "128 positions"]),
    ("--steps -1", ["--steps -1"]),
    ("--steps many", ["--steps", "'many'"]),
    ("--seed 9999999999999999999999", ["--seed"]),
    ("--lr nan", ["--lr nan"]),
    ("--batch-size 0", ["--batch-size 0"]),
    ("--colour red", ["--colour"]),
    ("--predict {tmp}/file", ["--predict", "--load"]),
    ("--target swh_Lat", ["'swh_Lat'", "swh_Latn"]),
    ("--target swh_Latn --method full", ["--target", "--method full"]),
    ("--target-steps -1", ["--target-steps -1"]),
    ("--device cuda:77", ["cuda:77"]),
    ("--device abacus", ["abacus"]),
    ("--backbone {tmp}/none", ["none", "--backbone DIR", "--toy"]),
    ("--backbone nobody/nothing", ["nobody/nothing", "--backbone DIR", "--toy"]),
    ("--data {tmp}/none", ["none", "no such folder"]),
    ("--data {tmp}/empty", ["empty"]),
    ("--data nobody/nothing", ["nobody/nothing", "--data DIR"]),
    ("--out {tmp}/file/below", ["file"]),
    ("--load {tmp}/none", ["none"]),
    ("--init-from {tmp}/none", ["none"]),
])
def test_bad_input_is_one_line_and_leaves_nothing(argv, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir(), (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, words, "--out", tmp_path / "out", *argv.format(tmp=tmp_path).split())
    assert sorted(tmp_path.rglob("*")) == before

@pytest.mark.parametrize("name, rows, words", [
    ("xx/dev.tsv", [("a", "topic1"), ("d", "topic2")], ["xx/dev.tsv:3", "'d'", "a, b"]),
    ("xx/dev.tsv", [("a", 'one\ntwo "three"'), ("d", "topic2")], ["xx/dev.tsv:4", "'d'"]),
    ("yy/test.tsv", [("b", "topic1"), ("b", " "), ("b", "topic2")], ["yy/test.tsv:3", "empty text"]),
    ("xx/train.tsv", [("a", "topic1"), ("", "topic2")], ["xx/train.tsv:3", "label"]),
    ("xx/train.tsv", [], ["no train rows", "xx"]),
    ("xx/dev.tsv", None, ["xx/dev.tsv"]),
    ("yy/test.tsv", None, ["yy/test.tsv"]),
    ("xx/train.tsv", b"a,b\n1,2\n", ["xx/train.tsv", "text"]),
    ("xx/train.tsv", b'category\ttext\na\t"A quote, open\nb\ttopic2\n', ["xx/train.tsv", "end of data"]),
    ("xx/train.tsv", b"index_id\tcategory\ttext\n0\ta\t\xff\xfe\n", ["xx/train.tsv"]),
    ("xx/train.tsv", b"index_id\tcategory\ttext\n0\ta\n", ["xx/train.tsv:2", "empty text"]),
])
def test_bad_data_names_file_and_line(name, rows, words, own, tmp_path, capsys):
    (own / name).unlink()
    if isinstance(rows, bytes):
        (own / name).write_bytes(rows)
    elif rows is not None:
        write_tsv(own / name, rows)
    refused(capsys, words, "--data", own, "--source", "xx", "--steps", 1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()

# ---------------------------------------------------------------------------------------------------- Data

def test_quoted_fields_are_read_whole(own):
    rows = [("a", 'he said "a\tb"'), ("b", "two\nlines"), ("a", "plain")]
    write_tsv(own / "xx/dev.tsv", rows)
    texts, labels = xpe.load_language(str(own), "xx", "dev")
    assert list(zip(labels, texts)) == rows

def test_byte_order_mark_is_not_data(own):
    (own / "xx/dev.tsv").write_text("\ufeffcategory\ttext\na\tone\n", encoding="utf-8")
    (own / "lines").write_text("\ufeffone\ntwo\n", encoding="utf-8")
    assert xpe.load_language(str(own), "xx", "dev") == (["one"], ["a"])
    assert xpe.read_lines(own / "lines") == ["one", "two"]

def test_a_source_may_mix_names_and_codes():
    assert xpe.pick_languages("joshi5, kab_Latn,eng_Latn", "toy") == [*groups.JOSHI5, "kab_Latn"]

def test_own_languages_and_labels(own, tmp_path):
    argv = "--source xx,yy --steps 80 --lr 1e-2 --prompt-lr 0.1 --data".split()
    folder = launch(tmp_path / "out", *argv, own)
    assert result(folder)["groups"] == {} and result(folder)["accuracy"] == {"xx": 100.0, "yy": 100.0}
    assert json.loads((folder / "adapter/xpe.json").read_text())["labels"] == ["a", "b", "c"]

def test_data_set_in_the_hubs_format(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    front, data = "---\nconfigs:\n", str(tmp_path / "hub")
    for code in ("eng_Latn", "fra_Latn"):
        front += f'- config_name: {code}\n  sep: "\\t"\n  data_files:\n'
        for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
            texts, labels = xpe.load_language("toy", code, split)
            write_tsv(tmp_path / f"hub/data/{code}/{split}.tsv", list(zip(labels, texts)))
            front += f"  - split: {name}\n    path: data/{code}/{split}.tsv\n"
    (tmp_path / "hub/README.md").write_text(front + "---\n")
    assert xpe.load_language(data, "eng_Latn", "dev") == xpe.load_language("toy", "eng_Latn", "dev")
    argv = "--source eng_Latn --steps 5".split()   # all languages here are two
    toy = launch(tmp_path / "toy", *argv, "--languages", "eng_Latn,fra_Latn")
    assert outcome(launch(tmp_path / "out", *argv, "--data", data)) == outcome(toy)

# ------------------------------------------------------------------------------------------------ Adapters

def adapter(folder, tensors, **config):
    """A hand-made adapter directory; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(task_type="SEQ_CLS", base_model_name_or_path="toy") | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

def random_head(prefix=""):
    """{name: tensor} of a classification head (H = 64, C = 7)."""
    shapes = {"dense.weight": [64, 64], "dense.bias": [64], "out_proj.weight": [7, 64], "out_proj.bias": [7]}
    return {prefix + name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}

@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_our_adapter(runs, tiny, method):
    peft, folder = pytest.importorskip("peft"), runs[method] / "adapter"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=7)
    theirs = logits(peft.PeftModel.from_pretrained(base, str(folder)).eval())
    assert close(logits(xpe.load_adapter(folder, xpe.load_backbone(tiny)[0]).eval()), theirs, 1e-5)
    assert theirs.std() > 1                        # a random head would give 0.1
    facts = json.loads((folder / "xpe.json").read_text())
    assert facts["labels"] == list(groups.LABELS) and sorted(facts["languages"]) == groups.ENARZHO

def test_we_load_pefts_adapter(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=7)
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    assert close(logits(xpe.load_adapter(tmp_path, xpe.load_backbone(tiny)[0]).eval()), logits(theirs), 1e-5)

def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = model_of("xpe", labels=3)
    xpe.save_adapter(model, tmp_path, base="somewhere", facts=dict(labels=["x"]))
    assert close(logits(xpe.load_adapter(tmp_path, model.backbone).eval()), logits(model.eval()), 1e-6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wanted = {HEAD + name: t for name, t in model.head.state_dict().items()}
    wanted["prompt_embeddings"] = model.prompt()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[name]) for name, t in tensors.items())
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == dict(
        peft_type="PROMPT_TUNING", task_type="SEQ_CLS", num_virtual_tokens=6, token_dim=64, num_layers=2,
        num_transformer_submodules=1, num_attention_heads=4, modules_to_save=["classifier"],
        inference_mode=True, prompt_tuning_init="RANDOM", base_model_name_or_path="somewhere")
    assert json.loads((tmp_path / "xpe.json").read_text()) == dict(labels=["x"])
    with pytest.raises(ValueError, match="bos"):
        xpe.save_adapter(model_of(pool="bos"), tmp_path)

@pytest.mark.parametrize("standard, encoded", [(4, 0), (1, 3), (0, 4)])
def test_released_layout_by_hand(standard, encoded, tmp_path):
    torch.manual_seed(1)
    prompt, pseudo, parts = torch.randn(standard, 64), torch.randn(encoded, 64), "prompt_encoder."
    head = random_head()
    tensors = {HEAD + name: t for name, t in head.items()}
    if standard:
        tensors[parts + "embedding.weight"] = prompt
    if encoded:
        (w0, b0), (w3, b3), (w6, b6) = ((torch.randn(n, m) / m ** 0.5, torch.randn(n))
                                        for n, m in ((16, 64), (16, 16), (64, 16)))
        for i, w, b in ((0, w0, b0), (3, w3, b3), (6, w6, b6)):
            tensors |= {f"{parts}xpe_head.{i}.weight": w, f"{parts}xpe_head.{i}.bias": b}
        tensors[parts + "xpe_embedding.weight"] = pseudo
        prompt = torch.cat([prompt, torch.relu(torch.relu(pseudo @ w0.T + b0) @ w3.T + b3) @ w6.T + b6])
    folder = adapter(tmp_path, tensors, peft_type="P_TUNING", num_virtual_tokens=4, xpe_ratio=0.75)
    model = xpe.load_adapter(folder, xpe.load_backbone("toy")[0]).eval()
    assert close(model.prompt(), prompt, 1e-5)
    assert close(logits(model), by_hand(model.backbone, prompt, head, TEXTS), 1e-5)
    method = "xpe" if standard == 0 else "spt" if encoded == 0 else "dual"      # --init-from keeps it
    cfg = xpe.Config(method, 0.75, backbone="toy", prompt_length=4, mlp_hidden=16, max_length=32)
    cfg.device, cfg.init_from = "cpu", str(folder)
    started = xpe.build_model(cfg, 7)[0].eval()
    assert torch.equal(started.prompt(), model.prompt()) and torch.equal(logits(started), logits(model))

@pytest.mark.parametrize("change, words", [
    (dict(prompt_embeddings=None), ["missing", "prompt_embeddings"]),
    ({HEAD + "dense.bias": None}, ["missing", HEAD + "dense.bias"]),
    ({HEAD + "out_proj.weight": None}, ["missing", HEAD + "out_proj.weight"]),
    ({"base_model.lora": torch.ones(2)}, ["surplus", "base_model.lora"]),
    ({HEAD + "out_proj.bias": torch.ones(8)}, [HEAD + "out_proj.bias", "(8,)", "(7,)"]),
    (dict(prompt_embeddings=torch.ones(5, 64)), ["prompt_embeddings", "(5, 64)", "(4, 64)"]),
    (dict(prompt_embeddings=torch.ones(4, 32)), ["prompt_embeddings", "(4, 32)", "(4, 64)"]),
    (dict(peft_type="LORA"), ["LORA"]),
    (dict(num_virtual_tokens="many"), ["adapter"]),
    ("adapter_config.json", ["adapter"]),
    ("adapter_model.safetensors", ["adapter"]),
])
def test_bad_adapter_is_one_line(change, words, tmp_path, capsys):
    config = dict(peft_type="PROMPT_TUNING", num_virtual_tokens=4)
    tensors = {"prompt_embeddings": torch.randn(4, 64)} | random_head(HEAD)
    for key, value in change.items() if isinstance(change, dict) else ():
        (config if key in config else tensors)[key] = value
    tensors = {name: t for name, t in tensors.items() if t is not None}
    folder = adapter(tmp_path / "adapter", tensors, **config)
    if isinstance(change, str):
        (folder / change).write_text("{")
    error = refused(capsys, words, "--load", folder, "--languages", "fra_Latn")
    with pytest.raises(ValueError) as info:
        xpe.load_adapter(folder, xpe.load_backbone("toy")[0])
    assert all(word in str(info.value) for word in words), error

def test_load_gives_the_accuracy_of_the_run(runs, capsys):
    accuracy = result(runs["dual"])["accuracy"]
    argv = ["--load", str(runs["dual"] / "adapter"), "--languages", ",".join(accuracy)]
    argv += ["--data", "toy", "--max-length", "32"]                  # the backbone's name is in the adapter
    capsys.readouterr()
    assert xpe.main(argv) == 0
    cells = re.findall(r"([a-z]{3}_[A-Z]\w+) +([\d.]+)", capsys.readouterr().out)
    assert {code: float(percent) for code, percent in cells} == {c: round(p, 1) for c, p in accuracy.items()}

def test_predict_labels_each_line(runs, tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "lines").write_text("\n".join([TEXTS[2], "", TEXTS[0], TEXTS[1]]) + "\n")
    (tmp_path / "bytes").write_bytes(b"fine\n\xff\xfe\n")
    argv = ["--toy", "--backbone", tiny, "--load", str(runs["xpe"] / "adapter"), "--predict"]
    capsys.readouterr()
    assert xpe.main([*argv, str(tmp_path / "lines")]) == 0
    answers = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    model = xpe.load_adapter(runs["xpe"] / "adapter", xpe.load_backbone(tiny)[0]).eval()
    p, label = by_hand(model.backbone, model.prompt(), model.head.state_dict(), TEXTS).softmax(-1).max(-1)
    assert [text for _, _, text in answers] == [TEXTS[2], "", TEXTS[0], TEXTS[1]] and answers[1] == [""] * 3
    for (name, share, text), i in zip([answer for answer in answers if answer[-1]], (2, 0, 1)):
        assert name == groups.LABELS[label[i]] and abs(float(share) - p[i]) < 1e-3
    with open(tmp_path / "lines") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert xpe.main([*argv, "-"]) == 0
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == answers
    refused(capsys, ["line 2"], *argv, tmp_path / "bytes")
    refused(capsys, ["gone"], *argv, tmp_path / "gone")

def test_a_stop_or_lack_of_memory_is_one_line(monkeypatch, capsys):
    def stopped(cfg, stop):
        signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt
    def full(cfg, stop):
        raise torch.OutOfMemoryError("out of memory")
    for job, code, line in ((stopped, 130, "xpe.py: stopped\n"), (full, 1, "xpe.py: out of memory\n")):
        monkeypatch.setattr(xpe, "use_adapter", job)                 # nothing to go on from
        assert xpe.main(["--load", "adapter"]) == code and capsys.readouterr().err == line

def test_init_from_a_run_or_an_adapter(runs, tiny, tmp_path, capsys):
    accuracy, dual = result(runs["dual"])["accuracy"], runs["dual"]
    argv = ["--source", "eng_Latn", "--languages", ",".join(accuracy), "--steps", 0, "--backbone", tiny]
    argv += ["--init-from"]
    for start, method in ((dual, "dual"), (dual / "adapter", "spt")):
        assert result(launch(tmp_path / method, *argv, start, "--method", method))["accuracy"] == accuracy
    for start, method in ((dual, "spt"), (dual / "adapter", "xpe"), (HERE, "spt")):
        refused(capsys, [str(start)], *argv, start, "--method", method, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()

# --------------------------------------------------------------------------------------------- Benchmark

def test_benchmark_counts_operations_as_torch_does(tiny, monkeypatch, capsys):
    def measure(work, **_):                        # whatever the work is: 8 microseconds for 8 batches
        if len(counted) < 3:                       # the first round shows all there is
            with FlopCounterMode(display=False) as counter:
                work()
            counted.append(counter.get_total_flops() / 8000)
        return 8e-6
    monkeypatch.setattr(xpe.timeit, "timeit", measure)
    for method in ("spt", "full"):                 # bf16: torch counts eager attention, not the fused one
        counted, argv = [], ["--benchmark", "--backbone", tiny, "--method", method, "--dtype", "bf16"]
        assert xpe.main(["--toy", *argv]) == 0
        rates = [int(row.split()[-2]) for row in capsys.readouterr().out.splitlines()[1:4]]
        products, step, evaluation = rates
        assert products == pytest.approx(counted[0], abs=1)
        if method == "full":                       # fp32 always
            assert step == pytest.approx(3 * evaluation, abs=3)
        else:                                      # the head is not counted
            assert [step, evaluation] == pytest.approx(counted[1:], rel=0.01)

# ------------------------------------------------------------------------------------------- Files as text

def section(title):
    """The text of xpe.py's section of this title."""
    parts = re.split(r"^# -{20,}\s*", (HERE / "xpe.py").read_text(encoding="utf-8"), flags=re.M)
    return next(part for part in parts if part.startswith(title))

def pasted(title):
    """What xpe.py's section of this title defines when run alone: nothing but torch is there."""
    names = dict(torch=torch)
    exec("#" + section(title), names)
    return names

def test_sections_can_be_copied_alone():
    names, p = pasted("The prompts"), torch.nn.Parameter(torch.ones(2))
    prompt = names["build_prompt"]("dual", 4, 64, 0.5)
    model = names["PromptedClassifier"](xpe.load_backbone("toy")[0], prompt, 3)
    assert logits(model.cache_prompt()).shape == (3, 3)
    names, p.grad = pasted("Optimizer and schedule"), torch.tensor([3.0, -3.0])
    names["Adafactor"]([p], lr=0.1).step()         # the first update is the gradient's sign
    assert close(p, torch.tensor([0.9, 1.1]), 1e-6)
    factors = [names["cosine_with_restarts"](step, 2, 10) for step in (1, 2, 4, 6, 10)]
    assert factors == pytest.approx([0.5, 1, 0.5, 1, 0])

def test_readmes_copying_section_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text(encoding="utf-8").split("## Copying from it")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    ids = torch.full((2, 6), 5)
    names = pasted("The prompts")
    names |= dict(json=json, Path=Path, InputError=type("InputError", (ValueError,), {}))
    names |= dict(Adafactor=xpe.Adafactor, cosine_with_restarts=xpe.cosine_with_restarts,
                  backbone=xpe.load_backbone("toy")[0], batches=[(ids, torch.ones_like(ids), ids[:, 0])] * 3)
    before = {name: p.clone() for name, p in names["backbone"].named_parameters()}
    exec(blocks[0].replace("1024", "64"), names)                     # the toy's hidden size
    model, free = names["model"], names["free"]
    assert len(free) == 1 and len(names["rest"]) == 1 + 6 + 4 and model.backbone.training
    assert model(ids, torch.ones_like(ids)).shape == (2, 7)
    assert all(torch.equal(p, before[name]) for name, p in model.backbone.named_parameters())
    assert all(p in names["optimizer"].state for p in free + names["rest"])
    exec("#" + section("Adapters"), names)
    before = names["model"].cache_prompt()(ids, torch.ones_like(ids))
    exec(blocks[1], names)
    assert torch.equal(names["model"].eval()(ids, torch.ones_like(ids)), before)

def test_size_of_the_file():
    lines = (HERE / "xpe.py").read_text(encoding="utf-8").splitlines()
    functions = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 40] == []
    assert [number for number, line in enumerate(lines, 1) if len(line) > 110] == [] and len(lines) <= 750

def test_help_is_whole_and_does_not_wait_for_torch(tmp_path):
    (tmp_path / "torch.py").write_text("1 / 0")
    shown = subprocess.run([sys.executable, HERE / "xpe.py", "--help"], capture_output=True, text=True,
                           env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    flags = {"--" + name.replace("_", "-") for name in vars(xpe.Config())}
    assert shown.returncode == 0 and flags <= set(re.findall(r"--[\w-]+", shown.stdout))

@pytest.mark.parametrize("where", ["README.md", "xpe.py", "groups.py"])
def test_every_documented_command_parses(where, tmp_path, monkeypatch):
    fence = r"^```\w*\n(.*?)^```" if where == "README.md" else r'\A"""(.*?)"""'
    blocks = re.findall(fence, (HERE / where).read_text(encoding="utf-8"), flags=re.M | re.S)
    found = re.findall(r"python3? (xpe|groups)\.py\b([^|&;<>\n]*)", "\n".join(blocks).replace("\\\n", " "))
    monkeypatch.setattr(groups, "load_runs", lambda folder: 1 / 0)   # as far as the arguments, no further
    for script, rest in found:
        argv = shlex.split(rest, comments=True)
        if "--load" in argv:                       # an adapter says for which backbone it is
            argv[argv.index("--load") + 1] = str(adapter(tmp_path, {}))
        if script == "xpe":
            xpe.check(xpe.parse(argv))
        else:
            pytest.raises(ZeroDivisionError, groups.main, argv)
    assert found

# ----------------------------------------------------------------------------------------------- groups.py

SIZES = dict(LANGUAGES=205, LABELS=7, ENARZHO=3, JOSHI5=7, SEEN=92, UNSEEN=113, LOW_PERFORMING=46)
COLUMNS = {"zs_eng": ("SIB-200", "eng_Latn"), "zs_ara": ("SIB-200", "arb_Arab"),
           "zs_zho": ("SIB-200", "zho_Hans"), "gpt35": ("GPT-3.5", "-"), "gpt4": ("GPT-4", "-")}

def test_groups_have_their_sizes_and_nest():
    for name, size in SIZES.items():
        assert len(set(getattr(groups, name))) == len(getattr(groups, name)) == size, name
    assert [len(codes) for codes in groups.TARGET_GROUPS.values()] == [46, 113, 85, 198]
    assert {*groups.ENARZHO} < {*groups.JOSHI5} < {*groups.SEEN}
    assert {*groups.LOW_PERFORMING} < {*groups.UNSEEN} and "nqo_Nkoo" in groups.LOW_PERFORMING
    seen, unseen = {*groups.FULL_SUPERVISION_SEEN}, {*groups.FULL_SUPERVISION_UNSEEN}
    assert seen < {*groups.SEEN} and unseen < {*groups.UNSEEN} and len(seen) == len(unseen) == 23
    assert len(unseen & {*groups.LOW_PERFORMING}) == 11         # section 4.2

def gap(column, group, nko=None):
    """Distance of the mean of the published scores, with this one for N'Ko, from the paper's Table 2."""
    scores = {code: getattr(row, column) for code, row in groups.LANGUAGES.items()} | {"nqo_Nkoo": nko}
    mean = groups.group_means({code: score for code, score in scores.items() if score is not None})[group]
    return abs(mean - groups.TABLE2[COLUMNS[column]][list(groups.TARGET_GROUPS).index(group)])

def nko_interval(columns, wanted):  # first and last score of N'Ko with which all these cells come out
    fit = [n / 10 for n in range(1001) if all(gap(c, g, n / 10) < 0.0501 for c in columns for g in wanted)]
    return fit[0], fit[-1]

def test_published_numbers():
    assert [round(sum(column), 1) for column in zip(*groups.TABLE1.values())] == [586.7, 591.8, 596.3, 590.3]
    assert all(gap(column, SEEN) < 0.0501 for column in COLUMNS)
    assert all(gap(column, group) < 0.0501 for column in ("gpt35", "gpt4") for group in (UNSEEN, ALL))
    assert nko_interval(("zs_eng", "zs_ara", "zs_zho"), (LOW, UNSEEN, ALL)) == (25.9, 26.9)
    assert nko_interval(("gpt35", "gpt4"), (LOW,)) == (3.4, 7.8)
    for name, mean in (("SEEN", 88.3), ("UNSEEN", 64.0), ("TARGETS", 76.1)):
        codes = getattr(groups, f"FULL_SUPERVISION_{name}")
        assert round(fmean(groups.LANGUAGES[code].xlmr_large for code in codes), 1) == mean
    assert groups.TABLE3 == {"Unseen": (64.0, 65.1), "Seen": (88.3, 87.6), "All": (76.1, 76.3)}

@pytest.fixture
def save(tmp_path):
    """save(name, accuracy, **config) leaves a run's result.json; a number stands for all the languages."""
    def save(name, accuracy, **config):
        config = dict(method="spt", xpe_ratio=0.0, source="joshi5", target="", seed=0, toy=False, steps=100,
                      device="cpu", out="runs", backbone="b") | config
        accuracy = accuracy if isinstance(accuracy, dict) else dict.fromkeys(groups.LANGUAGES, accuracy)
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(dict(config=config, accuracy=accuracy)))
        return str(tmp_path)
    return save

def rows(capsys, folder, *start):
    """The cells after `start` of all printed table rows that begin with it."""
    groups.main([folder])
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    return [line[len(start):] for line in lines if line[:len(start)] == [*start]]

def test_mean_deviation_and_difference(save, capsys):
    save("a", 50.0), save("b", 52.0, seed=1), save("c", 57.0, seed=2, device="cuda", out="elsewhere")
    folder = save("d", 60.0, method="dual", xpe_ratio=0.7)
    spt = "53.0 ± 3.6 (3) · 36.0 · +17.0"                       # deviations -3, -1, 4: sqrt(26 / 2) = 3.6
    assert rows(capsys, folder, LOW, "joshi5") == [[spt, "· 36.8", "60.0 (1) · 37.3 · +22.7", "· 39.1"]]
    assert rows(capsys, folder, "XPE", "seen") == [["· 41.9", "· 60.8", "", ""]]

def test_paired_difference(save, capsys):
    half = set(groups.LOW_PERFORMING[:23])                      # +4 on one half, 0 on the other: mean 2,
    save("a", 50.0), save("b", 10.0, seed=1)                    # with a standard error of 2 / sqrt(46) = 0.29
    save("c", 90.0, method="dual", xpe_ratio=0.7, seed=5)       # no seed in common: no row
    folder = save("x", {code: 50.0 + 4 * (code in half) for code in groups.LANGUAGES}, method="xpe")
    (low, unseen, seen, every), = rows(capsys, folder, "XPE - SPT", "joshi5")
    assert low == "+2.0 [+1.4, +2.6] (1)" and seen == "+0.0 [+0.0, +0.0] (1)"
    assert rows(capsys, folder, "DUAL-70 - SPT") == []
    zero = "+0.0 [+0.0, +0.0] (1)"                              # a source is in the other groups
    for i, source in enumerate(("seen", "seen,eng_Latn")):
        save(f"s{i}", 50.0, source=source), save(f"z{i}", 50.0, source=source, method="xpe")
        assert rows(capsys, folder, "XPE - SPT", source) == [[zero, zero, "", ""]]

def test_settings_are_kept_apart_and_languages_must_be_whole(save, capsys):
    save("a", 50.0), save("b", 60.0, seed=1, steps=200), save("t", 1.0, seed=2, steps=200, toy=True)
    folder = save("c", dict.fromkeys(groups.UNSEEN, 70.0), seed=3, languages="some")
    assert [r[0] for r in rows(capsys, folder, ALL, "joshi5")] == [f"{m} (1) · 68.7 · {d}" for m, d in (
        ("50.0", "-18.7"), ("60.0", "-8.7"), ("1.0", "-67.7"))]
    assert rows(capsys, folder, UNSEEN, "joshi5")[0][0] == "60.0 ± 14.1 (2) · 56.0 · +4.0"
    out = groups.main([folder]) or capsys.readouterr().out
    assert "follow 3 times" in out and "toy runs" in out and f"languages: {SEEN} 1, {ALL} 1." in out
    assert "## zero-shot steps=200, zero-shot toy=False" in out

def test_full_supervision(save, capsys):
    kab, yue = 39.5, 88.9                                       # SIB-200's published accuracies
    save("f", {"kab_Latn": 40.5, "yue_Hant": 0.0}, method="full", xpe_ratio=None, source="kab_Latn", steps=9)
    save("e", 60.0, method="full", source="eng_Latn", steps=9)  # beside SIB-200's zero-shot from English
    dual = dict(method="dual", xpe_ratio=0.7, steps=7)
    for seed, up in ((0, 1.0), (1, 3.0)):                       # seed 2 lacks yue_Hant: not in the deviation
        save(f"k{seed}", {"kab_Latn": kab + up}, target="kab_Latn", seed=seed, **dual)
        save(f"y{seed}", {"yue_Hant": yue + up}, target="yue_Hant", seed=seed, **dual)
    folder = save("k2", {"kab_Latn": kab + 8}, target="kab_Latn", seed=2, **dual)
    assert rows(capsys, folder, "SIB-200", "eng_Latn")[0][1] == "60.0 (1) · 54.0 · +6.0"
    assert rows(capsys, folder, "Unseen", "Full") == [["1 of 23", "40.5 (1) · 39.5 · +1.0", "64.0"]]
    assert rows(capsys, folder, "All", "DUAL-70") == [["2 of 46", "67.2 ± 1.4 (2) · 64.2 · +3.0", "76.3"]]

def test_csv_has_a_row_per_run_and_language(save, capsys, tmp_path):
    groups.main([save("a", {"nqo_Nkoo": 30.0, "mine": 9.5}), "--csv", str(tmp_path / "x.csv")])
    first, own = csv.DictReader((tmp_path / "x.csv").open(encoding="utf-8"))
    assert list(first.values())[6:] == ["nqo_Nkoo", groups.LANGUAGES["nqo_Nkoo"].name, "0", "1", "30.0"]
    assert list(own.values()) == ["a", "SPT", "0.0", "joshi5", "", "0", "mine", "", "0", "0", "9.5"]

@pytest.mark.parametrize("text, say, more", [("", "no finished run", []), ("{", "a/result.json", []),
                                             ("[]", "TypeError", []), ("", ".svg", ["--plot", "x.jpg"])])
def test_bad_input_is_one_line(text, say, more, tmp_path, capsys):
    (tmp_path / "a").mkdir(), (tmp_path / "a" / ("result.json" if text else "log.csv")).write_text(text)
    with pytest.raises(SystemExit) as end:
        groups.main([str(tmp_path), *more])
    error = capsys.readouterr().err
    assert end.value.code == 2 and say in error and error.count("\n") == 1
