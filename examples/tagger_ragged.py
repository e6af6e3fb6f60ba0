"""Tag the words of sentences of different lengths, padded or packed, with a bidirectional LSTM.

"light" is an adjective in "the light room", a noun in "the light holds", a verb in "they light rooms": words on both
sides tell. A bidirectional LSTM learns it, beside one that reads forward only, on shorter sentences than it is tested
on. Exit status 1 if it gets less than 99 % of such words right, or packed and padded logits are more than 1e-4 apart.

    pip install -e ".[examples]"
    python examples/tagger_ragged.py
"""

import argparse
import sys
from random import Random

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

import jaxrnn

AMBIGUOUS = ["light", "calm", "square", "level", "double"]
WORDS = {"DET": ["the", "this"], "PRON": ["they", "we"], "ADV": ["really", "almost"], "CONJ": ["and", "while"]}
WORDS |= {"ADJ": ["old", *AMBIGUOUS], "NOUN": ["room", *AMBIGUOUS], "VERB": ["hold", *AMBIGUOUS], "VERBS": ["holds"]}
TAGS, VOCABULARY = list(WORDS), ["(padding)", *sorted({word for words in WORDS.values() for word in words})]
NOUNS = ["NOUN", "ADJ NOUN", "ADJ ADJ NOUN", "ADV ADJ NOUN"]
OBJECTS = ["", *NOUNS, *(f"DET {noun}" for noun in NOUNS)]
CLAUSES = [f"PRON {adverb} VERB {object}" for adverb in ("", "ADV") for object in OBJECTS] * len(NOUNS)
CLAUSES += [f"DET {noun} {adverb} VERBS {object}" for noun in NOUNS for adverb in ("", "ADV") for object in OBJECTS]


def make_sentences(random: Random, count: int, clauses: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words and tags, as places in VOCABULARY and TAGS, (sentence, time), 0 past a sentence's end; and the lengths."""
    chosen = [random.choices(CLAUSES, k=random.randint(1, clauses)) for _ in range(count)]
    sentences = [" CONJ ".join(sentence).split() for sentence in chosen]
    words, tags = np.zeros((2, count, max(map(len, sentences))), np.int32)
    for row, sentence in enumerate(sentences):
        words[row, : len(sentence)] = [VOCABULARY.index(random.choice(WORDS[tag])) for tag in sentence]
        tags[row, : len(sentence)] = [TAGS.index(tag) for tag in sentence]
    return words, tags, (words > 0).sum(axis=1)


class Tagger(nnx.Module):
    def __init__(self, directions: int, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(len(VOCABULARY), 32, rngs=rngs)
        self.lstm = jaxrnn.LSTM(32, 64 // directions, batch_first=True, bidirectional=directions == 2, rngs=rngs)
        self.head = nnx.Linear(64, len(TAGS), rngs=rngs)

    @nnx.jit
    def __call__(self, words: jax.Array, lengths: jax.Array) -> jax.Array:
        """The logits of each word's tags in padded sentences; those past a sentence's end mean nothing."""
        return self.head(self.lstm(self.embed(words), lengths=lengths)[0])

    def tag_packed(self, words: jaxrnn.PackedSequence) -> jaxrnn.PackedSequence:
        """For packed sentences: layers that work word by word take the data. jit would trace each set of lengths."""
        output, _ = self.lstm(words._replace(data=self.embed(words.data)))
        return output._replace(data=self.head(output.data))


@nnx.jit
def train_step(model: Tagger, optimizer: nnx.Optimizer, words: jax.Array, tags: jax.Array, lengths: jax.Array) -> None:
    def loss(model: Tagger) -> jax.Array:  # the mean over the words, and not over the padding
        return optax.softmax_cross_entropy_with_integer_labels(model(words, lengths), tags).mean(where=words > 0)

    optimizer.update(model, nnx.grad(loss)(model))


def plot(path: str, curves: dict[str, list[float]], by_length: dict[str, list[float]], longest: int) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for color, name in zip(("tab:gray", "tab:orange", "tab:blue"), by_length, strict=True):
        left.plot(10 * np.arange(1, len(curves[name]) + 1), curves[name], color=color)
        right.plot(10 * np.arange(len(by_length[name])) + 5.5, by_length[name], "o-", color=color, label=name)
    right.axvspan(longest, right.get_xlim()[1], color="black", alpha=0.08, label="longer than any trained on")
    left.set(xlabel="training steps", ylabel="ambiguous words tagged right", title="held-out sentences, in training")
    left.yaxis.set_major_formatter("{x:.0%}")
    right.set(xlabel="words in the sentence", title="after training, by length")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tag the words of sentences with a bidirectional LSTM.")
    parser.add_argument("--quick", action="store_true", help="train for 150 steps instead of 600")
    parser.add_argument("--plot", default="tagger_ragged.png", help="the picture's file (default: %(default)s)")
    arguments = parser.parse_args()
    random, rounds = Random(0), 15 if arguments.quick else 60
    training, (words, tags, lengths) = make_sentences(random, 2000, 3), make_sentences(random, 300, 6)
    ambiguous = np.isin(words, [VOCABULARY.index(word) for word in AMBIGUOUS])
    usual = np.array([np.bincount(training[1][training[0] == word]).argmax() for word in range(len(VOCABULARY))])
    right = {"most frequent tag": usual[words] == tags}
    curves = {name: [flags[ambiguous].mean()] * rounds for name, flags in right.items()}
    for directions, name in ((1, "forward LSTM"), (2, "bidirectional LSTM")):
        model = Tagger(directions, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
        curves[name] = []
        for _ in track(range(rounds), description=name):
            for _ in range(10):
                chosen = random.choices(range(len(training[0])), k=32)
                train_step(model, optimizer, *(array[chosen] for array in training))
            right[name] = np.asarray(model(words, lengths)).argmax(axis=-1) == tags
            curves[name].append(right[name][ambiguous].mean())
    tens = [(lengths > low) & (lengths <= low + 10) for low in range(0, lengths.max(), 10)]
    by_length = {name: [flags[ten][ambiguous[ten]].mean() for ten in tens] for name, flags in right.items()}
    print("ambiguous words right, up to", *(f"{10 * ten:>6}" for ten in range(1, len(tens) + 1)), "words, and in all")
    for name, shares in by_length.items():
        print(f"{name:<28}", *(f"{share:>6.1%}" for share in (*shares, curves[name][-1])))
    packed = jaxrnn.pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
    padded, _ = jaxrnn.pad_packed_sequence(model.tag_packed(packed), batch_first=True)
    difference = np.abs(padded - model(words, lengths))[words > 0].max()
    print(f"the logits of packed and of padded sentences are at most {difference:.1e} apart")
    plot(arguments.plot, curves, by_length, training[2].max())
    return 0 if curves[name][-1] >= 0.99 and difference <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
