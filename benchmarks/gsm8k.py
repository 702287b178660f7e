"""Questions of GSM8K's files, and measurements of their answers that need no judge.

The reference answers end in a line "#### number" and have annotations <<sum=result>> in their text.
"""

import ast
import dataclasses
import json
import math
import operator
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

import rwkv7_jax as rwkv
from rwkv7_jax.checkpoints import model_tokenizer
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.loading import token_stream, windows
from rwkv7_jax.evaluation.scoring import token_nats
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.test_time import VERIFIERS, completion_rows

# Training questions that judge rates; no method learns from them.
JUDGES = 16

# Where the harness ends an answer: at what would be the next question.
NEXT_QUESTION = "\nQuestion:"

_FINAL = re.compile(r"#### [-+]?\d[\d,]*(?:\.\d+)?")
_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]*)>>")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
}
# Longer ones are no sums of a child's exercise, and would take long.
_LONGEST_SUM = 100


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its reference answer.

    Attributes:
        text: the question.
        answer: the steps with their annotations; "#### number" is the last line.
        prompt: ids that the model reads.
        completion: ids of the answer, with the id that ends texts.
    """

    text: str
    answer: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """Inputs of a row that holds both."""
        return len(self.prompt) + len(self.completion) - 1


def read_questions(path: str, tokenizer: rwkv.Tokenizer) -> list[Question]:
    """Reads the questions of a file, with the harness's words around them.

    Raises:
        ValueError: a line that is no question with an answer.
    """
    questions = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = json.loads(line)
                text = fields["question"]
                answer = fields["answer"]
                prompt = tokenizer.encode(f"Question: {text}\nAnswer:")
                completion = tokenizer.encode(f" {answer}")
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f'{path}:{number}: must be an object with "question" and "answer".'
                ) from None
            ids = (*completion, *tokenizer.stop_ids)
            questions.append(Question(text, answer, tuple(prompt), ids))
    return questions


def annotations(text: str) -> list[bool]:
    """Tells of each annotation <<sum=result>> of an answer whether it holds."""
    return [holds(*found.groups()) for found in _ANNOTATION.finditer(text)]


def holds(sum_text: str, result_text: str) -> bool:
    """Tells whether a result is that of a sum, up to its last written decimal place."""
    try:
        off = abs(_value(sum_text) - _value(result_text))
    except (ValueError, SyntaxError, ArithmeticError, MemoryError, RecursionError):
        return False
    # 1/3 is given as .33, and 2/3 as .66 or .67; a result without decimals has to be exact.
    places = len(result_text.partition(".")[2].strip())
    return off == 0 or (places > 0 and off < Fraction(1, 10**places))


def _value(text: str) -> Fraction:
    """Computes a sum of numbers, exactly.

    Raises:
        ValueError: something else than numbers, + - * / and brackets.
    """
    if len(text) > _LONGEST_SUM:
        raise ValueError(text)
    for sign in ",$":
        text = text.replace(sign, "")
    # "20%" is 20/100.
    text = text.replace("%", "/100").strip()

    def compute(node: ast.AST) -> Fraction:
        match node:
            case ast.Expression():
                return compute(node.body)
            case ast.BinOp() if type(node.op) in _OPERATORS:
                apply = _OPERATORS[type(node.op)]
                return apply(compute(node.left), compute(node.right))
            case ast.UnaryOp(op=ast.USub()):
                return -compute(node.operand)
            case ast.UnaryOp(op=ast.UAdd()):
                return compute(node.operand)
            case ast.Constant(value=int() | float()):
                # From its digits: 0.1 is a tenth, and 010 is ten.
                return Fraction(ast.get_source_segment(text, node) or "")
        raise ValueError(text)

    # Python refuses 010 as a number.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    return compute(ast.parse(text, mode="eval"))


def is_well_formed(answer: str) -> bool:
    """Tells whether the last line of an answer is "#### number"."""
    return bool(_FINAL.fullmatch(answer.rstrip().rpartition("\n")[2]))


class Subject:
    """A model, the questions that it is tuned on and measured by, and the sizes of a run."""

    def __init__(
        self,
        model: str,
        train: str,
        test: str,
        *,
        retention: str,
        steps: int,
        rows: int,
        length: int,
        questions: int,
        tokens: int,
        implementation: str | None = "scan",
    ):
        """Reads the model and the questions that fit.

        Args:
            model: a checkpoint of any layout.
            train: the file of training questions.
            test: the file of those that are measured.
            retention: text like the model's own; its held-out part is measured.
            steps: of a run.
            rows: questions of a step.
            length: ids of a question with its answer at most.
            questions: of the test file that are measured.
            tokens: ids of a written answer at most.
            implementation: of the WKV op; None for the best one of the device.

        Raises:
            ValueError: too few questions, or a file that cannot be read.
        """
        self.params, self.config = rwkv.load_model(model, dtype="float32")
        config = dataclasses.replace(self.config, implementation=implementation)
        self.model = rwkv.RWKV7(config)
        self.tokenizer = model_tokenizer(
            model, self.config.vocab_size, argument="`--model`"
        )
        self.steps = steps
        self.rows = rows
        self.length = length
        self.tokens = tokens
        training, self.training_share = self._fitting(train)
        measured, self.test_share = self._fitting(test)
        self.judges = training[:JUDGES]
        self.training = training[JUDGES:]
        self.measured = measured[:questions]
        if len(self.training) < self.rows or not self.measured:
            raise ValueError(
                f"`--length` must leave {JUDGES + self.rows} training questions and a test "
                f"question; {len(training)} and {len(measured)} have at most {self.length} ids."
            )
        stream = token_stream(
            retention, self.tokenizer, split="held_out", held_out=0.05
        )
        self.own_text = windows(stream, 512, 16)

    def _fitting(self, path: str) -> tuple[list[Question], float]:
        """Reads a file's questions that fit into a row, in one order for all runs."""
        questions = read_questions(path, self.tokenizer)
        fitting = [one for one in questions if one.inputs <= self.length]
        order = np.random.default_rng(0).permutation(len(fitting))
        share = len(fitting) / max(len(questions), 1)
        return [fitting[index] for index in order], share

    def training_rows(self, step: int, seed: int) -> list[Question]:
        """Returns the questions of a step; each comes once before any comes again."""
        places = range(step * self.rows, (step + 1) * self.rows)
        rows = []
        for place in places:
            epoch, position = divmod(place, len(self.training))
            order = np.random.default_rng([seed, epoch]).permutation(len(self.training))
            rows.append(self.training[order[position]])
        return rows

    def batch(self, questions: Sequence[Question]) -> Batch:
        """Makes rows in which the ids of answers are targets."""
        return completion_rows(
            [one.prompt for one in questions],
            [one.completion for one in questions],
            length=self.length,
        )

    def bits(
        self, questions: Sequence[Question], params, state
    ) -> tuple[np.ndarray, np.ndarray]:
        """Computes the bits of each reference answer, and its bytes."""
        rows = self.batch(questions)
        nats = token_nats(self.model, params, state, np.asarray(rows.tokens))
        mask = np.array(rows.mask)
        for row, one in enumerate(questions):
            # The id that ends the text has no bytes.
            mask[row, one.inputs - len(self.tokenizer.stop_ids) :] = 0
        sizes = [len(f" {one.answer}".encode()) for one in questions]
        return (nats * mask).sum(axis=1) / math.log(2), np.array(sizes)

    def judge(self, params, state) -> float:
        """Measures bits per byte of the answers that judge rates."""
        bits, sizes = self.bits(self.judges, params, state)
        return float(bits.sum() / sizes.sum())

    def answers(self, params, state) -> list[str]:
        """Lets the model answer the test questions: the likeliest id each time."""
        out = generate(
            self.model,
            params,
            [one.prompt for one in self.measured],
            state,
            tokens=self.tokens,
            temperature=0,
            stop_ids=self.tokenizer.stop_ids,
            stop_strings=(NEXT_QUESTION,),
            tokenizer=self.tokenizer,
        )
        assert out.texts is not None
        return out.texts

    def measure(self, params, state) -> dict[str, Any]:
        """Measures all columns; numbers are one for each question."""
        bits, sizes = self.bits(self.measured, params, state)
        own = rwkv.score(self.model, params, state, self.own_text, self.tokenizer)
        number = VERIFIERS["hash_number"]
        written = self.answers(params, state)
        right = []
        for one, text in zip(self.measured, written, strict=True):
            right.append(
                number(text) is not None and number(text) == number(one.answer)
            )
        return {
            "bits": bits.tolist(),
            "bytes": sizes.tolist(),
            "own_text": own.bits_per_byte,
            "right": right,
            **judged(written),
        }


def judged(written: Sequence[str]) -> dict[str, Any]:
    """Tells of answers how many are well formed, and of their annotations how many hold."""
    checks = [annotations(text) for text in written]
    return {
        "well_formed": [is_well_formed(text) for text in written],
        "annotations": sum(map(len, checks)),
        "annotations_that_hold": sum(map(sum, checks)),
    }
