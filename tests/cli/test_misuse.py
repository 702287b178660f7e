"""Misuse of the commands: exit code 2 and one sentence that names the culprit, never a traceback.

Nothing here may compile: every case is rejected before a program runs on a device.
"""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params

from rwkv7_jax.checkpoints import model_hash, save_model, save_state
from rwkv7_jax.cli.commands import main
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state

CONFIG = RWKV7Config(vocab_size=257, num_layers=1, width=32, head_size=16)
OTHER = RWKV7Config(vocab_size=257, num_layers=2, width=32, head_size=16)

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, states, text, and files whose content does not match their names."""
    folder = tmp_path_factory.mktemp("misuse")
    params = random_params(CONFIG, dtype=jnp.float32, scale=0.3)
    save_model(folder / "m.pth", params, CONFIG)
    _write_states(folder, model_hash(params, CONFIG))
    (folder / "t.txt").write_bytes(b"The sea is deep. " * 40)
    (folder / "short.txt").write_bytes(b"sea")
    (folder / "x.jsonl").write_bytes(b'{"text": "one"}\n')
    (folder / "bad.jsonl").write_bytes(b'{"text": "one"}\n{"txt": "two"}\n')
    (folder / "cut.jsonl").write_bytes(b'{"text": "one"}\n{"text": "tw')
    (folder / "qa.jsonl").write_bytes(b'{"question": "one", "reply": "two"}\n')
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "blank.jsonl").write_bytes(b"\n\n")
    (folder / "t.csv").write_bytes(b"a,b\n1,2\n")
    (folder / "t.parquet").write_bytes(b"PAR1" + bytes(40))
    (folder / "t.zip").write_bytes(b"PK\x03\x04" + bytes(40))
    (folder / "t.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    (folder / "utf16.txt").write_bytes("The sea".encode("utf-16"))
    (folder / "zeros.txt").write_bytes(b"sea" + bytes(9))
    (folder / "lfs.jsonl").write_bytes(LFS)
    (folder / "lfs.pth").write_bytes(LFS)
    (folder / "page.jsonl").write_bytes(b"<!DOCTYPE html><html></html>")
    (folder / "page.pth").write_bytes(b"<!DOCTYPE html><html></html>")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "junk.pth").write_bytes(bytes(range(256)))
    (folder / "junk.safetensors").write_bytes(bytes(range(256)))
    (folder / "cut.pth").write_bytes((folder / "m.pth").read_bytes()[:2000])
    (folder / "folder").mkdir()
    (folder / "link.pth").symlink_to("m.pth")
    (folder / "x.card.json").write_text("[]")
    (folder / "t.mask").write_bytes(b"\1")
    (folder / "list.json").write_text(json.dumps([{"question": "a"}]))
    return folder


def _write_states(folder, base):
    """Writes states of the model whose hash is `base`, of others, and of sessions."""
    for name, draws in (("a", 1), ("b", 2)):
        wkv = np.random.default_rng(draws).normal(size=init_state(CONFIG).wkv.shape)
        state = init_state(CONFIG).replace(wkv=jnp.asarray(wkv, jnp.float32))
        save_state(folder / f"{name}.pth", state, info={"base_model": base})
    save_state(folder / "large.pth", init_state(OTHER))
    save_state(folder / "old.pth", init_state(CONFIG), info={"session": "text"})
    save_state(folder / "narrow.pth", init_state(CONFIG), logits=np.ones(5))
    save_state(folder / "other.pth", init_state(CONFIG), info={"base_model": "another"})
    (folder / "session").mkdir()
    save_state(folder / "session" / "s.st", init_state(CONFIG))


GENERATE = "generate --model m.pth --prompt a"
OBSERVE = "observe observer --model m.pth --prompt a"
DOCTOR = "state doctor a.pth --model m.pth --data t.txt"

# Words of a command line, and what the sentence must have; "_" stands for an empty word.
MISUSE = [
    # Commands
    ("", "arguments are required: command"),
    ("fly", "invalid choice: 'fly'"),
    ("--fly", "arguments are required: command"),
    ("state", "arguments are required: command"),
    ("state fly", "invalid choice: 'fly'"),
    ("doctor now", "unrecognized arguments: now"),
    # convert
    ("convert", "arguments are required: source, target"),
    ("convert m.pth", "arguments are required: target"),
    ("convert none.pth out.pth", "`none.pth` does not exist"),
    ("convert _ out.pth", "`source` must name a file or a folder"),
    ("convert m.pth _", "`target` must name a file or a folder"),
    ("convert gs://b/m.pth out.pth", "`source` must be on this machine"),
    ("convert m.pth s3://b/out.pth", "`target` must be on this machine"),
    ("convert https://x.org/m.pth out.pth", "download it first"),
    ("convert m.pth out.pth --dtype int8", "invalid choice: 'int8'"),
    ("convert m.pth out.pth --format gguf", "invalid choice: 'gguf'"),
    ("convert m.pth out.pth --fast", "unrecognized arguments: --fast"),
    ("convert m.pth out.pth more", "unrecognized arguments: more"),
    ("convert t.txt out.pth", "t.txt"),
    ("convert junk.pth out.pth", "junk.pth"),
    ("convert empty.pth out.pth", "empty.pth"),
    ("convert lfs.pth out.pth", "lfs.pth"),
    ("convert page.pth out.pth", "page.pth"),
    ("convert cut.pth out.pth", "cut.pth"),
    ("convert junk.safetensors out.pth", "junk.safetensors"),
    ("convert folder out.pth", "folder"),
    ("convert hf:o/m out.pth", "hf download o/m"),
    ("convert o/m out.pth", "hf download o/m"),
    ("convert huggingface.co/o/m out.pth", "hf download o/m"),
    ("convert m.pth out.onnx", "`out.onnx` must end in .pth, .safetensors"),
    ("convert none.pth out.onnx", "`out.onnx` must end in .pth, .safetensors"),
    ("convert m.pth t.txt/out.pth", "`target` must be in a folder; `t.txt` is a file"),
    ("convert m.pth t.txt/a/b", "`target` must be in a folder; `t.txt` is a file"),
    ("convert m.pth hf:o/m", "write to a local path"),
    ("convert m.pth gs:b/out.pth", "`target` must be on this machine"),
    (
        "convert a.pth out.st",
        "`a.pth` is a start state, not a model: read it with load_state",
    ),
    # inspect
    ("inspect", "arguments are required: path"),
    ("inspect _", "`path` must name a file or a folder"),
    ("inspect none.pth", "`none.pth` does not exist"),
    ("inspect --state none.pth", "`none.pth` does not exist"),
    ("inspect --state t.txt", "t.txt"),
    ("inspect hf://m", "must be on this machine"),
    ("inspect hf:o/m", "hf download o/m"),
    ("inspect o/m", "hf download o/m"),
    ("inspect --verify o/m", "hf download o/m"),
    ("inspect --verify none.pth", "`none.pth` does not exist"),
    ("inspect --state gs:b/s.pth", "must be on this machine"),
    ("inspect a.pth", "with `rwkv7 state info`"),
    # report
    ("report", "arguments are required: folder"),
    ("report _", "`folder` must name a file or a folder"),
    ("report none", "none"),
    ("report folder", "must be a run directory"),
    ("report t.txt", "t.txt"),
    ("report .", "must be a run directory"),
    # data
    ("data", "arguments are required: SOURCE"),
    ("data t.txt", "`OUT` must be given, or `--show`"),
    ("data t.txt out --show 1", "`OUT` must be left out with `--show`"),
    ("data none.txt out", "`none.txt` must be a file"),
    ("data _ out", "`SOURCE` must name a text; got none"),
    ("data t.txt _", "`OUT` must name a file or a folder"),
    ("data t.txt, out", "`SOURCE` must have a name between commas; entry 2"),
    ("data ,t.txt out", "entry 1"),
    ("data t.txt,,t.txt out", "entry 2"),
    ("data , out", "entry 1"),
    ("data gs://b/x.jsonl out", "`SOURCE` must be on this machine"),
    ("data t.txt gs://b/out", "`OUT` must be on this machine"),
    ("data hf:o/d out", "`SOURCE` must be on this machine"),
    ("data o/d out", "hf download --repo-type dataset o/d"),
    ("data t.txt s3:b/out", "`OUT` must be on this machine"),
    ("data t.txt t.txt/out", "`OUT` must be in a folder; `t.txt` is a file"),
    ("data t.txt,./t.txt out", "`SOURCE` must name each file once"),
    ("data t.txt,folder/../t.txt out", "'folder/../t.txt' are the same file"),
    ("data x.jsonl,short.txt,.//x.jsonl out", "`SOURCE` must name each file once"),
    ("data x.card.json x", "`OUT` must not overwrite `SOURCE`"),
    ("data ./x.card.json x.bin", "`OUT` must not overwrite `SOURCE`"),
    ("data . t", "must not overwrite `SOURCE`; `t.mask` is read from `.`"),
    ("data task:copy out", "task:copy"),
    ("data t.csv out", 'its keys are "a", "b"'),
    ("data t.parquet out", "t.parquet` is not a Parquet table"),
    ("data t.zip out", "t.zip` is a zip archive"),
    ("data t.png out", "t.png` is a picture"),
    ("data utf16.txt out", "encoding=utf-16"),
    ("data zeros.txt out", "zero byte at 3"),
    ("data lfs.jsonl out", "Git LFS pointer"),
    ("data page.jsonl out", "web page"),
    ("data empty.jsonl out", "is an empty file"),
    ("data blank.jsonl out", "has no document"),
    ("data cut.txt.gz out", "incomplete download"),
    ("data bad.jsonl out", 'bad.jsonl:2: must have a "text"'),
    ("data cut.jsonl out", "cut.jsonl:2: not one JSON object"),
    ("data qa.jsonl out", 'its keys are "question", "reply"'),
    ("data list.json out", 'record 1: must have a "text"'),
    ("data m.pth out", "m.pth"),
    ("data t.bin out", "`SOURCE` must be text; got the token cache"),
    ("data t.BIN out", "`SOURCE` must be text; got the token cache"),
    ("data t.bin --show 1", "t.bin` does not exist"),
    (
        "data t.txt out --vocabulary gpt2",
        "bytes256, ids or an existing file; got 'gpt2'",
    ),
    ("data t.txt out --on-bad ignore", "invalid choice: 'ignore'"),
    ("data t.txt out --packing rows", "invalid choice: 'rows'"),
    ("data t.txt out --encoding klingon", "`encoding` must be a text encoding"),
    ("data t.txt out --encoding rot13", "`encoding` must be a text encoding"),
    ("data utf16.txt out --encoding ascii", "is not ascii at about byte 0"),
    ("data t.txt --show 0", "`--show` must be at least 1; got 0"),
    ("data t.txt --show -3", "`--show` must be at least 1; got -3"),
    ("data t.txt --show 1000000000000", "`--show` must be at most 1000000"),
    ("data t.txt --show 1 --length 1000000000000", "`--length` must be at most"),
    (f"{GENERATE} --tokens 99999999999999999999", "`--tokens` must be at most"),
    ("data t.txt --show x", "`--show` must be a whole number; got 'x'"),
    ("data t.txt --show 1.5", "`--show` must be a whole number"),
    ("data t.txt --show nan", "`--show` must be a whole number"),
    ("data t.txt --show 1 --length 0", "`--length` must be at least 1"),
    ("data t.txt --show 1 --length 1000", "must have at least 2000 tokens"),
    ("data t.txt --show 1 --seed -1", "`--seed` must be at least 0"),
    # generate
    ("generate", "arguments are required: --model"),
    ("generate --model m.pth", "`--prompt` must be given, unless `--state` is"),
    ("generate --model m.pth --observer folder", "`--prompt` must be given, unless"),
    ("generate --model m.pth --state a.pth", "to continue from `a.pth`"),
    (
        "generate --model m.pth --state a.pth --chat --system b",
        "`--system` must come with `--prompt`",
    ),
    (
        "generate --model m.pth --state old.pth --prompt _",
        "`old.pth`, because the file has no logits",
    ),
    (
        "generate --model m.pth --state narrow.pth --prompt _",
        "logits of this model's 257 ids; got 5 (in `narrow.pth`)",
    ),
    ("generate --prompt a", "arguments are required: --model"),
    ("generate --model _ --prompt a", "`--model` must name a file or a folder"),
    ("generate --model none.pth --prompt a", "`none.pth` does not exist"),
    ("generate --model t.txt --prompt a", "t.txt"),
    ("generate --model a.pth --prompt a", "`rwkv7 state convert` or `--state`"),
    (
        "generate --model session --prompt a",
        "`session` holds only a start state, s.st",
    ),
    ("generate --model gs://b/m.pth --prompt a", "`--model` must be on this machine"),
    (f"{GENERATE} --tokens -1", "`--tokens` must be at least 0; got -1"),
    (f"{GENERATE} --tokens 1.5", "`--tokens` must be a whole number"),
    (f"{GENERATE} --tokens many", "`--tokens` must be a whole number"),
    (f"{GENERATE} --tokens inf", "`--tokens` must be a whole number"),
    (f"{GENERATE} --temperature -1", "`--temperature` must be at least 0; got -1"),
    (f"{GENERATE} --temperature nan", "`--temperature` must be finite; got nan"),
    (f"{GENERATE} --temperature inf", "`--temperature` must be finite; got inf"),
    (f"{GENERATE} --temperature hot", "`--temperature` must be a number; got 'hot'"),
    (f"{GENERATE} --top-p 1.5", "`--top-p` must be from 0 to 1; got 1.5"),
    (f"{GENERATE} --top-p -0.1", "`--top-p` must be from 0 to 1; got -0.1"),
    (f"{GENERATE} --top-p nan", "`--top-p` must be finite"),
    (f"{GENERATE} --top-k -1", "`--top-k` must be at least 0"),
    (f"{GENERATE} --top-k 2.5", "`--top-k` must be a whole number"),
    (f"{GENERATE} --presence-penalty nan", "`--presence-penalty` must be finite"),
    (f"{GENERATE} --presence-penalty x", "`--presence-penalty` must be a number"),
    (f"{GENERATE} --frequency-penalty inf", "`--frequency-penalty` must be finite"),
    (f"{GENERATE} --penalty-decay 2", "`--penalty-decay` must be from 0 to 1; got 2"),
    (f"{GENERATE} --penalty-decay nan", "`--penalty-decay` must be finite"),
    (f"{GENERATE} --seed x", "`--seed` must be a whole number"),
    (f"{GENERATE} --seed 1e3", "`--seed` must be a whole number"),
    (f"{GENERATE} --seed 99999999999999999999", "`--seed` must be at most"),
    (f"{GENERATE} --stop _", "`--stop` must not be empty"),
    (f"{GENERATE} --stop \\q --escape", "`--stop` must have n, t, r"),
    ("generate --model m.pth --prompt a\\ --escape", "`--prompt` must have n, t, r"),
    (f"{GENERATE} --state none.pth", "`none.pth` does not exist"),
    (f"{GENERATE} --state _", "`--state` must name a file or a folder"),
    (f"{GENERATE} --state t.txt", "t.txt"),
    (f"{GENERATE} --state large.pth", "large.pth"),
    (f"{GENERATE} --state junk.pth", "junk.pth"),
    (f"{GENERATE} --state empty.pth", "empty.pth"),
    (f"{GENERATE} --state lfs.pth", "lfs.pth"),
    (f"{GENERATE}b --observer none", "none"),
    (f"{GENERATE}b --observer folder", "folder"),
    (f"{GENERATE} --observer _", "`--observer` must name a file or a folder"),
    (f"{GENERATE} --state a.pth --observer folder", "not allowed with argument"),
    (f"{GENERATE} --save-state s.npz", "`--save-state` must end in .pth"),
    (f"{GENERATE} --save-state s", "`--save-state` must end in .pth"),
    (f"{GENERATE} --save-state t.txt/s.pth", "`t.txt` is a file"),
    (f"{GENERATE} --save-state gs://b/s.pth", "`--save-state` must be on this machine"),
    (f"{GENERATE} --save-state _", "`--save-state` must name a file or a folder"),
    (f"{GENERATE} --save-state hf:o/s.pth", "`--save-state` must be on this machine"),
    (f"{GENERATE} --save-state m.pth", "must not overwrite `--model`"),
    (f"{GENERATE} --save-state ./m.pth", "must not overwrite `--model`"),
    (f"{GENERATE} --save-state folder/../m.pth", "must not overwrite `--model`"),
    (f"{GENERATE} --save-state link.pth", "must not overwrite `--model`"),
    (f"{GENERATE} --state o/s", "hf download o/s"),
    ("generate --model o/m --prompt a", "hf download o/m"),
    ("generate --model hf:o/m --prompt a", "hf download o/m"),
    (f"{GENERATE}b --observer o/m", "hf download o/m"),
    (f"{GENERATE} --fast", "unrecognized arguments: --fast"),
    (f"{GENERATE} --model", "`--model` must have a value"),
    (
        f"{GENERATE} --model -m.pth",
        "write `--model=VALUE` if the value begins with a hyphen",
    ),
    # observe
    ("observe", "arguments are required: OBSERVER"),
    (OBSERVE, "`--out` or `--text` must be given"),
    (f"{OBSERVE} --out s.npz", "`--out` must end in .pth"),
    (f"{OBSERVE} --out _", "`--out` must name a file or a folder"),
    (f"{OBSERVE} --out s.pth", "observer"),
    (f"{OBSERVE} --text t.txt --length 0", "`--length` must be at least 1"),
    (f"{OBSERVE} --text t.txt --windows 1", "`--windows` must be at least 2"),
    (f"{OBSERVE} --text t.txt, ", "`--text` must have a name between commas"),
    (f"{OBSERVE} --text _", "`--out` or `--text` must be given"),
    (f"{OBSERVE} --out ./m.pth", "`--out` must not overwrite `--model`"),
    (f"{OBSERVE} --out a.pth --text ./a.pth", "`--out` must not overwrite `--text`"),
    (f"{OBSERVE} --text t.txt,./t.txt", "`--text` must name each file once"),
    (f"{OBSERVE} --out hf:o/s.pth", "`--out` must be on this machine"),
    # state info
    ("state info", "arguments are required: state"),
    ("state info none.pth", "`none.pth` does not exist"),
    ("state info _", "`state` must name a file or a folder"),
    ("state info t.txt", "t.txt"),
    ("state info m.pth", "m.pth"),
    ("state info junk.safetensors", "junk.safetensors"),
    ("state info a.pth --model none.pth", "`none.pth` does not exist"),
    ("state info large.pth --model m.pth", "large.pth"),
    # state convert
    ("state convert", "arguments are required: state, target"),
    ("state convert none.pth out.st", "`none.pth` does not exist"),
    ("state convert m.pth out.st", "m.pth"),
    ("state convert a.pth out.gguf", "`target` must end in .pth, .safetensors"),
    ("state convert a.pth folder", "`target` must end in .pth"),
    ("state convert a.pth out.st --dtype int8", "invalid choice: 'int8'"),
    # state mix
    ("state mix", "arguments are required: --weights"),
    ("state mix a.pth b.pth out.pth", "arguments are required: --weights"),
    ("state mix --weights 1", "must name at least one state and the output file"),
    ("state mix a.pth --weights 1", "must name at least one state and the output file"),
    ("state mix a.pth b.pth --weights", "expected at least one argument"),
    (
        "state mix a.pth b.pth out.pth --weights 1",
        "one weight for each of 2 states; got 1",
    ),
    ("state mix a.pth --weights 1 gs://b/o.pth", "`OUT` must be on this machine"),
    ("state mix a.pth out.pth --weights 1,2", "one weight for each of 1 states; got 2"),
    ("state mix a.pth b.pth out.pth --weights 1,", "entry 2 of '1,' is empty"),
    ("state mix a.pth b.pth out.pth --weights ,", "entry 1"),
    ("state mix a.pth b.pth out.pth --weights 1,x", "must be comma-separated numbers"),
    ("state mix a.pth b.pth out.pth --weights 1;2", "must be comma-separated numbers"),
    ("state mix a.pth b.pth out.pth --weights nan,1", "must be finite"),
    ("state mix a.pth b.pth out.pth --weights inf,1", "must be finite"),
    ("state mix a.pth b.pth out.pth --weights 1e300,1", "`weights` must be finite and"),
    ("state mix a.pth b.pth out.pth --weights 1,-1e39", "`weights` must be finite and"),
    (
        "state mix a.pth b.pth out.pth --weights -1",
        "one weight for each of 2 states; got 1",
    ),
    ("state mix a.pth none.pth out.pth --weights 1,1", "`none.pth` does not exist"),
    ("state mix a.pth large.pth out.pth --weights 1,1", "states[1]"),
    ("state mix a.pth other.pth out.pth --weights 1,1", "other.pth"),
    ("state mix a.pth b.pth out --weights 1,1", "`OUT` must end in .pth"),
    ("state mix a.pth b.pth folder --weights 1,1", "`OUT` must end in .pth"),
    ("state mix a.pth _ out.pth --weights 1,1", "must name a file or a folder"),
    # state scale
    ("state scale", "arguments are required: state, --alpha, target"),
    ("state scale a.pth out.pth", "arguments are required: --alpha"),
    ("state scale a.pth --alpha 0.5", "arguments are required: target"),
    ("state scale a.pth --alpha nan out.pth", "`--alpha` must be finite; got nan"),
    ("state scale a.pth --alpha inf out.pth", "`--alpha` must be finite"),
    ("state scale a.pth --alpha half out.pth", "`--alpha` must be a number"),
    ("state scale a.pth --alpha 1e300 out.pth", "`alpha` must be finite and at most"),
    ("state scale a.pth --alpha -1e39 out.pth", "`alpha` must be finite and at most"),
    ("state scale a.pth --alpha 3e38 out.pth", "must be finite; got NaN or Inf"),
    ("state scale none.pth --alpha 1 out.pth", "`none.pth` does not exist"),
    ("state scale a.pth --alpha 1 out.txt", "`target` must end in .pth"),
    ("state scale a.pth --alpha 1 _", "`target` must name a file or a folder"),
    # state doctor
    ("state doctor", "arguments are required: state, --model, --data"),
    ("state doctor a.pth --model m.pth", "arguments are required: --data"),
    ("state doctor none.pth --model m.pth --data t.txt", "`none.pth` does not exist"),
    ("state doctor a.pth --model none.pth --data t.txt", "`none.pth` does not exist"),
    ("state doctor a.pth --model m.pth --data none.txt", "`none.txt` must be a file"),
    (
        "state doctor a.pth --model m.pth --data _",
        "`--data` must name a text; got none",
    ),
    ("state doctor a.pth --model m.pth --data t.txt,", "`--data` must have a name"),
    ("state doctor a.pth --model m.pth --data task:fly", "fly"),
    ("state doctor a.pth --model m.pth --data t.csv", 'its keys are "a", "b"'),
    (
        "state doctor a.pth --model m.pth --data short.txt",
        "more than 256 tokens; got 4",
    ),
    ("state doctor large.pth --model m.pth --data t.txt", "large.pth"),
    (f"{DOCTOR} --generic t.txt,", "`--generic` must have a name between commas"),
    (f"{DOCTOR} --length 0", "`--length` must be at least 1"),
    (f"{DOCTOR} --windows 0", "`--windows` must be at least 1"),
    (f"{DOCTOR} --windows x", "`--windows` must be a whole number"),
    (f"{DOCTOR} --held-out 2", "`--held-out` must be from 0 to 1; got 2"),
    (f"{DOCTOR} --held-out -0.5", "`--held-out` must be from 0 to 1"),
    (f"{DOCTOR} --held-out nan", "`--held-out` must be finite"),
    (f"{DOCTOR} --seed -1", "`--seed` must be at least 0"),
    (f"{DOCTOR} --picture ./a.pth", "`--picture` must not overwrite `state`"),
    (f"{DOCTOR} --picture folder/../m.pth", "must not overwrite `--model`"),
    (f"{DOCTOR} --picture ./t.txt", "`--picture` must not overwrite `--data`"),
    (
        f"{DOCTOR} --generic x.jsonl --picture ./x.jsonl",
        "`--picture` must not overwrite `--generic`",
    ),
    (f"{DOCTOR} --generic t.txt,./t.txt", "`--generic` must name each file once"),
    (f"{DOCTOR} --picture gs:b/p.png", "`--picture` must be on this machine"),
    (f"{DOCTOR} --picture p.txt", "`--picture` must end in "),
    (
        f"{DOCTOR} --picture folder",
        "`--picture` must name a file; 'folder' is a folder",
    ),
]


def test_there_are_enough_cases_and_no_duplicates():
    assert len({words for words, _ in MISUSE}) == len(MISUSE) >= 120


@pytest.mark.parametrize(
    ("line", "sentence"), MISUSE, ids=[row[0] or "-" for row in MISUSE]
)
def test_misuse_is_one_sentence_and_exit_code_2(
    files, monkeypatch, capsys, line, sentence
):
    monkeypatch.chdir(files)
    before = sorted(path.name for path in files.iterdir())
    words = ["" if word == "_" else word for word in line.split()]
    try:
        code = main(words)
    except SystemExit as error:
        # How argparse ends a program.
        code = error.code
    assert code == 2
    shown, printed = capsys.readouterr()
    # Results only after success: no heading of a table that does not come.
    assert shown == ""
    assert sentence in printed
    assert printed.startswith("rwkv7: ") and printed.count("\n") == 1
    assert len(printed) < 600 and "Traceback" not in printed
    assert not printed.rstrip().endswith("..")
    # Nothing was written, not even a part of a file.
    assert sorted(path.name for path in files.iterdir()) == before
