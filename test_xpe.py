"""The tests, offline and on the CPU: `pytest`.  Each compares with what others wrote, or with constants.

Optimizer and schedule step by step with transformers' Adafactor and cosine restarts; a prompt of length 0 with
transformers' plain classifier; adapters with PEFT and with the released layout computed by hand; the order of the
prompt, counts, settings and labels with constants that can be checked by eye; a cached prompt with the encoded one;
a batch with its sentences one by one; a run with itself repeated, killed and gone on with, bit for bit; the groups
and the tables of groups.py with the paper's numbers.
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

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")  # before anything reads them

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import groups
import xpe

HERE = Path(__file__).parent
METHODS = ("spt", "dual", "xpe")
SHORT = ["--toy", "--source", "eng_Latn", "--languages", "eng_Latn,fra_Latn,nqo_Nkoo"]
WORDS = {"a": "topic1 topic2 topic3", "b": "topic11 topic12 topic13", "c": "topic21 topic22 topic23"}
TEXTS = ["topic1 topic2 filler3", "topic11", "filler1 topic21 topic22 foreign3 filler9 topic25"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A local --backbone: a tiny XLM-R with a head for seven labels and its tokenizer, as transformers saves it."""
    folder, (backbone, tokenizer) = tmp_path_factory.mktemp("tiny"), xpe.load_backbone("toy")
    config = transformers.XLMRobertaConfig.from_dict(backbone.config.to_dict() | dict(num_labels=7))
    whole = transformers.XLMRobertaForSequenceClassification(config)
    whole.roberta.load_state_dict(backbone.state_dict())
    whole.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """{method: folder of a finished run on the tiny backbone}; some languages of each group are tested."""
    out, codes = tmp_path_factory.mktemp("runs"), "fra_Latn,ita_Latn,pol_Latn,awa_Deva,fao_Latn,nqo_Nkoo,dzo_Tibt"
    for method in METHODS:
        assert xpe.main(["--toy", "--backbone", tiny, "--method", method, "--source", "enarzho", "--steps", "120",
                         "--languages", codes, "--lr", "6e-3", "--prompt-lr", "0.1", "--out", f"{out}/{method}"]) == 0
    return {method: next((out / method).iterdir()) for method in METHODS}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of 20 epochs."""
    out = tmp_path_factory.mktemp("whole")
    assert xpe.main([*SHORT, "--steps", "100", "--out", str(out)]) == 0
    return next(out.iterdir())


def files(folder):
    """{path: (content, time of last change)} of everything below a folder."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).rglob("*") if p.is_file()}


def outcome(folder):
    """What must be equal to the last bit in two runs alike: prompt and head, accuracies, the curve."""
    result = json.loads((folder / "result.json").read_text())
    return (folder / "adapter/adapter_model.safetensors").read_bytes(), result["accuracy"], result["dev_curve"]


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
            write_tsv(tmp_path / "own" / code / f"{split}.tsv", [(x, WORDS[x]) for x in labels * 4])
    return tmp_path / "own"


def model_of(method="dual", length=6, pool="first", backbone=None, labels=7, seed=0, ratio=0.5):
    """A model with a random prompt around the toy's backbone, in eval mode."""
    backbone = backbone or xpe.load_backbone("toy")[0]
    torch.manual_seed(seed)
    prompt = xpe.build_prompt(method, length, backbone.config.hidden_size, ratio)
    return xpe.PromptedClassifier(backbone, prompt, labels, pool).eval()


def tokens(*texts):
    """{input_ids, attention_mask} of texts, right-padded."""
    e = xpe.load_backbone("toy")[1](list(texts), padding=True, return_tensors="pt")
    return dict(input_ids=e["input_ids"], attention_mask=e["attention_mask"])


@torch.no_grad()
def by_hand(backbone, prompt, head, texts, position=0):
    """Logits of [prompt | text] one text at a time, from the backbone and {name: tensor} of a head."""
    states = [backbone(inputs_embeds=torch.cat([prompt, backbone.get_input_embeddings()(
        tokens(text)["input_ids"])[0]])[None]).last_hidden_state[0, position] for text in texts]
    hidden = torch.tanh(torch.stack(states) @ head["dense.weight"].T + head["dense.bias"])
    return hidden @ head["out_proj.weight"].T + head["out_proj.bias"]


def close(a, b, tolerance):
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


# ----------------------------------------------------------------------------- Optimizer and schedule


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("scale", [1.0, 1e-15])                      # of gradients: 1e-15 is where eps counts
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_transformers(decay, scale, dtype, tolerance):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(0.1 * torch.randn(shape, dtype=dtype)) for shape in ((5, 3), (4,), (2, 3, 4), (1, 6))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = xpe.Adafactor(ours, lr=5e-3, weight_decay=decay)
    b = transformers.optimization.Adafactor(theirs, lr=5e-3, weight_decay=decay, scale_parameter=False,
                                            relative_step=False, warmup_init=False, beta1=None)
    for step in range(50):
        if step == 25:                                               # a new one goes on from the saved state
            saved, a = a.state_dict(), xpe.Adafactor(ours, lr=123.0)
            a.load_state_dict(saved)
        for p, q in zip(ours, theirs):                               # a gradient ten times as large is clipped
            p.grad = q.grad = torch.randn_like(p) * scale * (10 if step % 9 == 8 else 1)
        a.step(), b.step()
        assert all(close(p, q, tolerance) for p, q in zip(ours, theirs)), step


@pytest.mark.parametrize("warmup, total, cycles", [(0, 30, 1), (3, 30, 2), (10, 97, 3), (2400, 24000, 2), (5, 5, 2)])
def test_schedule_is_transformers(warmup, total, cycles):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, warmup, total, cycles).lr_lambdas[0]
    for step in range(total + 3):
        assert abs(xpe.cosine_with_restarts(step, warmup, total, cycles) - factor(step)) <= 1e-12, step


# ---------------------------------------------------------------------------------------- The prompts


@pytest.mark.parametrize("ratio, encoded", [(0.3, 6), (0.7, 14), (0.01, 1), (0.99, 19)])
def test_ratio_gives_the_number_of_encoded_vectors(ratio, encoded):
    prompt = xpe.build_prompt("dual", 20, 8, ratio)
    assert prompt.encoded.pseudo_prompt.shape == (encoded, 8) and prompt.standard.vectors.shape == (20 - encoded, 8)
    assert prompt().shape == (20, 8)


@pytest.mark.parametrize("method, rows", [("spt", [1, 1, 1, 1]), ("dual", [1, 1, 2, 2]), ("xpe", [2, 2, 2, 2])])
def test_standard_part_first_encoded_part_second(method, rows):
    prompt = xpe.build_prompt(method, 4, 3, ratio=0.5)
    with torch.no_grad():
        for name, p in prompt.named_parameters():                    # free vectors 1; last Linear 0 x + 2
            p.fill_({"vectors": 1.0, "mlp.6.bias": 2.0}.get(name.removeprefix("standard.").removeprefix("encoded."), 0))
    assert prompt().tolist() == [[row] * 3 for row in rows]


def test_encoder_treats_each_vector_alone():
    prompt = xpe.CrossPromptEncoder(5, 8).eval()
    before, order = prompt(), torch.tensor([3, 0, 4, 1, 2])
    prompt.pseudo_prompt.data = prompt.pseudo_prompt.data[order]
    assert close(prompt(), before[order], 1e-6) and not close(before[order], before, 1e-3)


@pytest.mark.parametrize("method, count", [("spt", 1_077_255), ("dual", 1_668_615), ("xpe", 1_668_615)])
def test_parameter_counts_for_xlm_r_large(method, count):
    with torch.device("meta"):
        backbone = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(
            vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, type_vocab_size=1,
            intermediate_size=4096, max_position_embeddings=514), add_pooling_layer=False).requires_grad_(False)
        model = xpe.PromptedClassifier(backbone, xpe.build_prompt(method, 20, 1024, 0.7), 7)
    frozen = sum(p.numel() for p in [*backbone.parameters(), *model.head.parameters()])
    assert sum(p.numel() for p in xpe.trainable(model).values()) == count < 0.003 * frozen
    assert round(frozen / 1e6, 1) == 559.9


# -------------------------------------------------------------------------------------- The classifier


def test_prompt_of_length_0_is_the_plain_classifier(tiny):
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tiny).eval()
    model = xpe.PromptedClassifier(xpe.load_backbone(tiny)[0], xpe.SoftPrompt(0, 64), 7).eval()
    model.head.load_state_dict(plain.classifier.state_dict())
    with torch.no_grad():
        assert close(model(**tokens(*TEXTS)), plain(**tokens(*TEXTS)).logits, 1e-6)


@pytest.mark.parametrize("pool, position", [("first", 0), ("bos", 6)])
def test_logits_by_hand_whatever_the_padding(pool, position):
    model = model_of(pool=pool)
    expected = by_hand(model.backbone, model.prompt(), model.head.state_dict(), TEXTS, position)
    with torch.no_grad():
        assert close(model(**tokens(*TEXTS)), expected, 1e-5)
    assert not close(expected[:1], expected[1:2], 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_cached_prompt_gives_the_same_and_needs_no_encoder(method):
    model = model_of(method)
    with torch.no_grad():
        before, after = model(**tokens(*TEXTS)), model.cache_prompt()(**tokens(*TEXTS))
    assert torch.equal(before, after) and [p.shape for p in model.prompt.parameters()] == [(6, 64)]


# ------------------------------------------------------------------------------------------- Training


def test_backbone_stays_frozen(tmp_path, monkeypatch):
    seen, train = [], xpe.train

    def spy(model, *rest):
        before = {name: t.clone() for name, t in model.state_dict().items()}
        seen.extend([model, before])
        return train(model, *rest)
    monkeypatch.setattr(xpe, "train", spy)
    assert xpe.main([*SHORT, "--steps", "10", "--out", str(tmp_path)]) == 0
    model, before = seen
    after = {name: t.numpy().tobytes() for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        if name.startswith("backbone."):
            assert p.grad is None and after[name] == before[name].numpy().tobytes(), name
    assert not torch.equal(model.head.dense.weight, before["head.dense.weight"])


PAPER = dict(standard=(5e-3, 0.0), pseudo=(5e-5, 0.1), weight=(5e-5, 0.1), bias=(5e-5, 0.1))
RELEASED = dict(standard=(5e-3, 0.0), pseudo=(5e-3, 0.0), weight=(5e-5, 0.01), bias=(5e-5, 0.0))


@pytest.mark.parametrize("recipe, table", [("paper", PAPER), ("released", RELEASED)])
@pytest.mark.parametrize("method", METHODS)
def test_rates_and_decay_of_each_parameter(method, recipe, table):
    cfg = xpe.parse(["--method", method, "--recipe", recipe])
    xpe.check(cfg)
    model = model_of(method)
    if (method, recipe) == ("dual", "released"):
        table = table | dict(standard=(5e-5, 0.0))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in xpe.parameter_groups(model, cfg) for p in g["params"]}
    kind = {"vectors": "standard", "pseudo_prompt": "pseudo", "weight": "weight", "bias": "bias"}
    assert {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found} == \
        {name: table[kind[name.split(".")[-1]]] for name in xpe.trainable(model)}


def test_epoch_batches_cover_every_row_once():
    lengths = xpe.np.random.default_rng(0).integers(5, 60, size=1001)
    a, b, again = ([list(rows) for rows in xpe.epoch_batches(lengths, 32, 0, epoch)] for epoch in (0, 1, 0))
    assert sorted(sum(a, [])) == sorted(sum(b, [])) == list(range(1001)) and a == again != b
    assert len(a) == 32 and sorted(map(len, a)) == [9] + [32] * 31
    assert fmean(max(lengths[rows]) - min(lengths[rows]) for rows in a) < 20             # of 55; unsorted: 52


def test_predictions_keep_the_order_and_equal_one_by_one():
    model, tokenizer = model_of(labels=7), xpe.load_backbone("toy")[1]
    codes = ["eng_Latn", "nqo_Nkoo"]
    split = xpe.load_split("toy", codes, "test", list(groups.LABELS), tokenizer, torch.device("cpu"), 32)
    texts, names = (sum(both, []) for both in zip(*[xpe.toy_language(code, "test") for code in codes]))
    expected = by_hand(model.backbone, model.prompt(), model.head.state_dict(), texts)
    assert close(xpe.predict(model, split, tokens=200), expected, 1e-5)
    accuracy, loss, guess = xpe.evaluate(model, split)
    right = [groups.LABELS[i] == name for i, name in zip(expected.argmax(1).tolist(), names)]
    assert guess.tolist() == expected.argmax(1).tolist()
    assert accuracy == pytest.approx({"eng_Latn": 100 * fmean(right[:35]), "nqo_Nkoo": 100 * fmean(right[35:])})


@pytest.mark.parametrize("method", METHODS)
def test_toy_learns_what_the_backbone_knows(runs, method):
    result = json.loads((runs[method] / "result.json").read_text())
    by_group = result["groups"]
    assert by_group["Seen w/o Joshi5"] >= 80
    assert by_group["Seen w/o Joshi5"] > by_group["Unseen"] > by_group["Low-performing"]
    assert {*result} == {*"config versions seconds trainable_parameters dev_accuracy accuracy groups dev_curve".split()}
    assert len(result["accuracy"]) == 7 and result["dev_curve"][-1]["step"] == 120


# ------------------------------------------------------------------------------------- Repeat, go on, stop


def test_one_seed_twice_is_bit_identical(tmp_path):
    for out, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert xpe.main([*SHORT, "--steps", "15", "--seed", seed, "--out", str(tmp_path / out)]) == 0
    a, b, c = (outcome(next((tmp_path / out).iterdir())) for out in "abc")
    assert a == b and a[0] != c[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_run_ends_as_if_it_never_was(number, whole, tmp_path):
    command = [*SHORT, "--steps", "100", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(HERE / "xpe.py"), *command], text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    folder, until = tmp_path / whole.name, time.time() + 120
    while not (folder / "checkpoint.pt").exists() and process.poll() is None and time.time() < until:
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number] and "Traceback" not in error
    assert (folder / "checkpoint.pt").exists() and not (folder / "result.json").exists()
    assert xpe.main(command) == 0 and outcome(folder) == outcome(whole)


def test_finished_run_is_reported_not_repeated(whole, capsys):
    before = files(whole)
    assert xpe.main([*SHORT, "--steps", "100", "--out", str(whole.parent)]) == 0
    assert "finished" in capsys.readouterr().out and files(whole) == before


def test_folder_of_another_config_is_refused(whole, capsys):
    before = files(whole)
    assert xpe.main([*SHORT, "--steps", "99", "--batch-size", "7", "--out", str(whole.parent)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and files(whole) == before
    assert re.findall(r"(\w+) \(", error) == ["steps", "batch_size"] and "100 there, 99 here" in error


@pytest.mark.parametrize("content", ["cut", "foreign", "pickle", "other model"])
def test_unreadable_checkpoint_is_refused(content, whole, tmp_path, capsys):
    folder = tmp_path / whole.name
    folder.mkdir()
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    torch.save({"foreign": {"weights": 1}, "pickle": Path("x"), "cut": state,
                "other model": state | dict(model={"a": torch.zeros(1)})}[content], folder / "checkpoint.pt")
    if content == "cut":
        (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:5000])
    before = files(tmp_path)
    assert xpe.main([*SHORT, "--steps", "100", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt" in error and error.count("\n") == 1 and files(tmp_path) == before


def test_non_finite_loss_names_step_and_languages(own, tmp_path, monkeypatch, capsys):
    real, evaluated = torch.nn.functional.cross_entropy, []

    def poisoned(logits, y):                                         # from the second epoch on, label a: xx alone
        evaluated.extend([1] * (len(y) > 1))
        return real(logits, y) * (float("nan") if evaluated and y.tolist() == [0] else 1.0)
    command = ["--toy", "--data", str(own), "--source", "xx,yy", "--batch-size", "1", "--steps", "40"]
    command += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", poisoned)
    assert xpe.main(command) == 1
    error, folder = capsys.readouterr().err, next((tmp_path / "out").iterdir())
    step = int(re.search(r"step (\d+)", error)[1])
    assert error.count("\n") == 1 and 17 <= step <= 32 and "xx" in error and "yy" not in error
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert kept["run"]["step"] == 16 and all(t.isfinite().all() for t in kept["model"].values())
    monkeypatch.undo()
    assert xpe.main(command) == 0


# ---------------------------------------------------------------------------------------------- Bad input


@pytest.mark.parametrize("argv, words", [
    ("--source eng_Lat", ["'eng_Lat'", "eng_Latn"]),
    ("--source joshi", ["'joshi'", "joshi5"]),
    ("--source eng_Latn --languages fra_Latn,french", ["'french'"]),
    ("--method dul", ["'dul'", "dual"]),
    ("--xpe-ratio 0", ["--xpe-ratio 0", "between 0", "--method spt"]),
    ("--xpe-ratio 1", ["--xpe-ratio 1", "between 0", "--method xpe"]),
    ("--xpe-ratio 1.5", ["--xpe-ratio 1.5", "between 0"]),
    ("--method spt --xpe-ratio 0.5", ["--xpe-ratio", "spt"]),
    ("--prompt-length 1", ["--prompt-length 1", "2"]),
    ("--prompt-length 100", ["100", "128 positions"]),
    ("--steps -1", ["--steps -1"]),
    ("--steps many", ["--steps", "'many'"]),
    ("--lr nan", ["--lr nan"]),
    ("--batch-size 0", ["--batch-size 0"]),
    ("--colour red", ["--colour"]),
    ("--device cuda:77", ["cuda:77"]),
    ("--device abacus", ["abacus"]),
    ("--backbone {tmp}/none", ["none", "--backbone DIR", "--toy"]),
    ("--backbone nobody/nothing", ["nobody/nothing", "--backbone DIR", "--toy"]),
    ("--data {tmp}/none", ["none", "no such folder"]),
    ("--data {tmp}/empty", ["empty"]),
    ("--data nobody/nothing", ["nobody/nothing", "--data DIR"]),
    ("--out {tmp}/file/below", ["file"]),
])
def test_bad_input_is_one_line_and_leaves_nothing(argv, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir(), (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert xpe.main(["--toy", "--out", str(tmp_path / "out"), *argv.format(tmp=tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error and sorted(tmp_path.rglob("*")) == before
    assert all(word in error for word in words), error


@pytest.mark.parametrize("name, rows, words", [
    ("xx/dev.tsv", [("a", "topic1"), ("d", "topic2")], ["xx/dev.tsv:3", "'d'", "a, b"]),
    ("xx/dev.tsv", [("a", "one\ntwo \"three\""), ("d", "topic2")], ["xx/dev.tsv:4", "'d'"]),
    ("yy/test.tsv", [("b", "topic1"), ("b", " "), ("b", "topic2")], ["yy/test.tsv:3", "empty text"]),
    ("xx/train.tsv", [("a", "topic1"), ("", "topic2")], ["xx/train.tsv:3", "label"]),
    ("xx/train.tsv", [], ["no train rows", "xx"]),
    ("xx/dev.tsv", None, ["xx/dev.tsv"]),
    ("yy/test.tsv", None, ["yy/test.tsv"]),
    ("xx/train.tsv", b"a,b\n1,2\n", ["xx/train.tsv", "category"]),
    ("xx/train.tsv", b"index_id\tcategory\ttext\n0\ta\t\xff\xfe\n", ["xx/train.tsv"]),
    ("xx/train.tsv", b"index_id\tcategory\ttext\n0\ta\n", ["xx/train.tsv:2", "empty text"]),
])
def test_bad_data_names_file_and_line(name, rows, words, own, tmp_path, capsys):
    (own / name).unlink()
    if isinstance(rows, bytes):
        (own / name).write_bytes(rows)
    elif rows is not None:
        write_tsv(own / name, rows)
    command = ["--toy", "--data", str(own), "--source", "xx", "--steps", "1", "--out", str(tmp_path / "out")]
    assert xpe.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert all(word in error for word in words), error


# --------------------------------------------------------------------------------------------------- Data


def test_quoted_fields_are_read_whole(own):
    rows = [("a", 'he said "a\tb"'), ("b", "two\nlines"), ("a", "plain")]
    write_tsv(own / "xx/dev.tsv", rows)
    assert list(zip(*xpe.load_language(str(own), "xx", "dev")[::-1])) == rows


def test_own_languages_and_labels(own, tmp_path):
    assert xpe.main(["--toy", "--data", str(own), "--source", "xx,yy", "--steps", "80", "--batch-size", "16",
                     "--lr", "1e-2", "--prompt-lr", "0.1", "--out", str(tmp_path / "out")]) == 0
    folder = next((tmp_path / "out").iterdir())
    result = json.loads((folder / "result.json").read_text())
    assert result["groups"] == {} and result["accuracy"] == {"xx": 100.0, "yy": 100.0}
    assert json.loads((folder / "adapter/xpe.json").read_text())["labels"] == ["a", "b", "c"]


def test_data_set_in_the_hubs_format(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    front = "---\nconfigs:\n"
    for code in ("eng_Latn", "fra_Latn"):
        front += f'- config_name: {code}\n  sep: "\\t"\n  data_files:\n'
        for ours, theirs in (("train", "train"), ("dev", "validation"), ("test", "test")):
            texts, names = xpe.toy_language(code, ours)
            write_tsv(tmp_path / f"hub/data/{code}/{ours}.tsv", list(zip(names, texts)))
            front += f"  - split: {theirs}\n    path: data/{code}/{ours}.tsv\n"
    (tmp_path / "hub/README.md").write_text(front + "---\n")
    data = str(tmp_path / "hub")
    assert xpe.load_language(data, "eng_Latn", "dev") == xpe.toy_language("eng_Latn", "dev")
    assert xpe.main(["--toy", "--data", data, "--source", "eng_Latn", "--steps", "5", "--out", f"{tmp_path}/a"]) == 0
    assert xpe.main(["--toy", "--source", "eng_Latn", "--languages", "eng_Latn,fra_Latn", "--steps", "5", "--out", f"{tmp_path}/b"]) == 0
    assert outcome(next((tmp_path / "a").iterdir())) == outcome(next((tmp_path / "b").iterdir()))


# ------------------------------------------------------------------------------------------------ Adapters


def adapter(folder, tensors, **config):
    """A hand-made adapter directory; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(dict(task_type="SEQ_CLS") | config))
    return folder


def random_head(hidden=64, labels=7):
    """{name: tensor} of a classification head."""
    shapes = {"dense.weight": (hidden, hidden), "dense.bias": (hidden,)}
    shapes |= {"out_proj.weight": (labels, hidden), "out_proj.bias": (labels,)}
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_our_adapter(runs, tiny, method):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=7)
    theirs = peft.PeftModel.from_pretrained(base, str(runs[method] / "adapter")).eval()
    ours = xpe.load_adapter(runs[method] / "adapter", xpe.load_backbone(tiny)[0]).eval()
    with torch.no_grad():
        a, b = theirs(**tokens(*TEXTS)).logits, ours(**tokens(*TEXTS))
    assert close(a, b, 1e-5) and b.std() > 1                         # a random head would give 0.1
    facts = json.loads((runs[method] / "adapter/xpe.json").read_text())
    assert facts["labels"] == list(groups.LABELS) and sorted(facts["languages"]) == groups.ENARZHO


def test_we_load_pefts_adapter(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=7)
    theirs = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)).eval()
    theirs.save_pretrained(tmp_path)
    ours = xpe.load_adapter(tmp_path, xpe.load_backbone(tiny)[0]).eval()
    with torch.no_grad():
        assert close(ours(**tokens(*TEXTS)), theirs(**tokens(*TEXTS)).logits, 1e-5)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    model, text = model_of("xpe", labels=3), tokens(*TEXTS)
    xpe.save_adapter(model, tmp_path, base="somewhere", facts=dict(labels=["x"]))
    again = xpe.load_adapter(tmp_path, model.backbone).eval()
    with torch.no_grad():
        assert close(again(**text), model.eval()(**text), 1e-6)
    tensors, config = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_config.json"
    head = {f"base_model.classifier.{name}": t for name, t in model.head.state_dict().items()}
    assert tensors.keys() == {"prompt_embeddings", *head} and all(torch.equal(tensors[name], head[name]) for name in head)
    assert torch.equal(tensors["prompt_embeddings"], model.prompt())
    config, wanted = json.loads(config.read_text()), dict(
        peft_type="PROMPT_TUNING", task_type="SEQ_CLS", num_virtual_tokens=6, token_dim=64, inference_mode=True,
        num_transformer_submodules=1, num_attention_heads=4, num_layers=2, modules_to_save=["classifier"],
        prompt_tuning_init="RANDOM", base_model_name_or_path="somewhere")
    assert config == wanted and json.loads((tmp_path / "xpe.json").read_text()) == dict(labels=["x"])
    with pytest.raises(ValueError, match="bos"):
        xpe.save_adapter(model_of(pool="bos"), tmp_path)


@pytest.mark.parametrize("standard, encoded", [(4, 0), (1, 3), (0, 4)])
def test_authors_layout_by_hand(standard, encoded, tmp_path):
    torch.manual_seed(1)
    table, pseudo, head = torch.randn(standard, 64), torch.randn(encoded, 64), random_head()
    w0, w3, w6 = torch.randn(16, 64) / 8, torch.randn(16, 16) / 4, torch.randn(64, 16)
    b0, b3, b6 = torch.randn(16), torch.randn(16), torch.randn(64)
    tensors = {f"base_model.classifier.{name}": t for name, t in head.items()}
    tensors |= {"prompt_encoder.embedding.weight": table} if standard else {}
    if encoded:
        tensors |= {"prompt_encoder.xpe_embedding.weight": pseudo}
        for i, (w, b) in {0: (w0, b0), 3: (w3, b3), 6: (w6, b6)}.items():
            tensors |= {f"prompt_encoder.xpe_head.{i}.weight": w, f"prompt_encoder.xpe_head.{i}.bias": b}
    folder = adapter(tmp_path, tensors, peft_type="P_TUNING", num_virtual_tokens=4, token_dim=64, xpe_ratio=0.75,
                     encoder_hidden_size=16)
    prompt = torch.cat([table, torch.relu(torch.relu(pseudo @ w0.T + b0) @ w3.T + b3) @ w6.T + b6])
    model = xpe.load_adapter(folder, xpe.load_backbone("toy")[0]).eval()
    with torch.no_grad():
        assert close(model.prompt(), prompt, 1e-5)
        assert close(model(**tokens(*TEXTS)), by_hand(model.backbone, prompt, head, TEXTS), 1e-5)


@pytest.mark.parametrize("change, words", [
    (dict(prompt_embeddings=None), ["missing", "prompt_embeddings"]),
    ({"base_model.classifier.dense.bias": None}, ["missing", "base_model.classifier.dense.bias"]),
    ({"base_model.classifier.out_proj.bias": None}, ["missing", "base_model.classifier.out_proj.bias"]),
    ({"base_model.lora": torch.ones(2)}, ["surplus", "base_model.lora"]),
    ({"base_model.classifier.out_proj.bias": torch.ones(8)}, ["base_model.classifier.out_proj.bias", "(8,)"]),
    (dict(prompt_embeddings=torch.ones(5, 64)), ["prompt_embeddings", "(5, 64)", "(4, 64)"]),
    (dict(prompt_embeddings=torch.ones(4, 32)), ["prompt_embeddings", "(4, 32)", "(4, 64)"]),
    (dict(peft_type="LORA"), ["LORA"]),
    (dict(num_virtual_tokens="many"), ["adapter"]),
    ("adapter_config.json", ["adapter"]),
    ("adapter_model.safetensors", ["adapter"]),
    (None, ["adapter"]),
])
def test_bad_adapter_is_one_line(change, words, tmp_path, capsys):
    tensors = {"prompt_embeddings": torch.randn(4, 64)}
    tensors |= {f"base_model.classifier.{name}": t for name, t in random_head().items()}
    config = dict(peft_type="PROMPT_TUNING", num_virtual_tokens=4, token_dim=64)
    if isinstance(change, dict):
        config |= {key: value for key, value in change.items() if key in config}
        tensors |= {key: value for key, value in change.items() if key not in config}
    if change is not None:
        adapter(tmp_path / "adapter", {name: t for name, t in tensors.items() if t is not None}, **config)
    if isinstance(change, str):
        (tmp_path / "adapter" / change).write_text("{")
    with pytest.raises(ValueError) as info:
        xpe.load_adapter(tmp_path / "adapter", xpe.load_backbone("toy")[0])
    assert xpe.main(["--toy", "--load", str(tmp_path / "adapter"), "--languages", "fra_Latn"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error and word in str(info.value) for word in words), error


def test_load_gives_the_accuracy_of_the_run(runs, tiny, capsys):
    accuracy = json.loads((runs["dual"] / "result.json").read_text())["accuracy"]
    capsys.readouterr()
    assert xpe.main(["--toy", "--backbone", tiny, "--load", str(runs["dual"] / "adapter"), "--languages",
                     ",".join(accuracy)]) == 0
    cells = re.findall(r"([a-z]{3}_[A-Z]\w+) +([\d.]+)", capsys.readouterr().out)
    assert {code: float(percent) for code, percent in cells} == {c: round(p, 1) for c, p in accuracy.items()}


def test_predict_labels_each_line(runs, tiny, tmp_path, capsys):
    (tmp_path / "lines").write_text("\n".join([TEXTS[2], "", TEXTS[0], TEXTS[1]]) + "\n")
    command = ["--toy", "--backbone", tiny, "--load", str(runs["xpe"] / "adapter"), "--predict"]
    capsys.readouterr()
    assert xpe.main([*command, str(tmp_path / "lines")]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    model = xpe.load_adapter(runs["xpe"] / "adapter", xpe.load_backbone(tiny)[0])
    p, label = by_hand(model.backbone, model.prompt(), model.head.state_dict(), TEXTS).softmax(-1).max(-1)
    assert [row[-1] for row in rows] == [TEXTS[2], "", TEXTS[0], TEXTS[1]]
    assert [row[0] for row in rows if row[-1]] == [groups.LABELS[label[i]] for i in (2, 0, 1)]
    assert [float(row[1]) for row in rows if row[-1]] == pytest.approx([p[i].item() for i in (2, 0, 1)], abs=1e-3)
    for content, word in ((b"fine\n\xff\xfe\n", "line 2"), (None, "gone")):
        (tmp_path / "gone").unlink(missing_ok=True), (tmp_path / "bytes").write_bytes(content or b"")
        assert xpe.main([*command, str(tmp_path / ("bytes" if content else "gone"))]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1


def test_init_from_a_run_or_an_adapter(runs, tiny, tmp_path, capsys):
    accuracy = json.loads((runs["dual"] / "result.json").read_text())["accuracy"]
    command = ["--toy", "--backbone", tiny, "--source", "eng_Latn", "--languages", ",".join(accuracy), "--steps", "0"]
    for out, method, start in (("a", "dual", runs["dual"]), ("b", "spt", runs["dual"] / "adapter")):
        assert xpe.main([*command, "--method", method, "--init-from", str(start), "--out", f"{tmp_path}/{out}"]) == 0
        assert outcome(next((tmp_path / out).iterdir()))[1] == accuracy, out
    capsys.readouterr()
    for out, method, start in (("c", "xpe", runs["dual"] / "adapter"), ("d", "spt", runs["dual"]), ("e", "spt", HERE)):
        assert xpe.main([*command, "--method", method, "--init-from", str(start), "--out", f"{tmp_path}/{out}"]) == 2
        error = capsys.readouterr().err
        assert str(start) in error and error.count("\n") == 1 and not (tmp_path / out).exists()


# ------------------------------------------------------------------------------------- The file as a text


def pasted(title):
    """What the section of this title defines, run alone: nothing but torch is there."""
    source = (HERE / "xpe.py").read_text(encoding="utf-8")
    section, = [part for part in re.split(r"^# -{20,}", source, flags=re.MULTILINE)
                if part.lstrip("\n# ").startswith(title)]
    names = dict(torch=torch)
    exec("#" + section, names)
    return names


def test_sections_can_be_copied_alone():
    names = pasted("The prompts")
    model = names["PromptedClassifier"](xpe.load_backbone("toy")[0], names["build_prompt"]("dual", 4, 64, 0.5), 3)
    model(**tokens(*TEXTS)).sum().backward()
    assert model.prompt.standard.vectors.grad.any() and model.cache_prompt()(**tokens(*TEXTS)).shape == (3, 3)
    names, p = pasted("Optimizer and schedule"), torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([3.0, -3.0])                               # the first update is the gradient's sign
    names["Adafactor"]([p], lr=0.1).step()
    assert close(p, torch.tensor([0.9, 1.1]), 1e-6)
    assert [names["cosine_with_restarts"](step, 2, 10) for step in (1, 2, 4, 6, 10)] == [0.5, 1, pytest.approx(0.5), 1, 0]


def test_size_of_the_file():
    lines = (HERE / "xpe.py").read_text(encoding="utf-8").splitlines()
    functions = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 40] == []
    assert [i for i, line in enumerate(lines, 1) if len(line) > 110] == []
    assert len(lines) <= 750


def commands(text):
    """The arguments of each `python xpe.py` and `python groups.py` in a text, as (script, [argument])."""
    for line in text.replace("\\\n", " ").splitlines():
        for script, rest in re.findall(r"python3? (xpe|groups)\.py([^|&;<>]*)", line):
            yield script, [re.sub(r"\$\{?\w+}?", "0", word) for word in shlex.split(rest, comments=True)]


@pytest.mark.parametrize("where", ["README.md", "xpe.py", "groups.py"])
def test_every_documented_command_parses(where, monkeypatch):
    if not (HERE / where).exists():
        pytest.skip(f"no {where}")
    text = (HERE / where).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S) if where == "README.md" else [text.split('"""')[1]]
    found = list(commands("\n".join(blocks)))
    monkeypatch.setattr(groups, "load_runs", lambda folder: 1 / 0)   # as far as the arguments, no further
    for script, argv in found:
        if script == "xpe":
            xpe.check(xpe.parse(argv))
        else:
            pytest.raises(ZeroDivisionError, groups.main, argv)
    assert found
