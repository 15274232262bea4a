"""Pretraining text for the quality benchmark: fetch it from Debian packages, train a vocabulary on it, write token ids.

    python examples/benchmarks/quality/make_text.py .gpu/q            # about 10 minutes; needs apt-get and dpkg-deb

All of it is documentation, dictionaries and essays that Debian 12 ships in "main", so every licence is a free one; each
package's own is in its ``copyright`` file. Neither the text nor the tokens belong in a repository: run this instead.

Written to the folder: ``text_train.u16`` and ``text_valid.u16`` (token ids, documents in a fixed shuffled order, each
followed by ``<|endoftext|>``), ``tokenizer.json`` and ``text.json`` (packages, versions, licences, sizes, hashes).
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer

END = "<|endoftext|>"
LONGEST_DOCUMENT = 20_000  # characters; longer files and dictionaries are cut into documents of about this length
SHORTEST_DOCUMENT = 200
SHORTEST_PARAGRAPH = 40  # shorter ones are mostly menus, signatures and lists of names


@dataclass(frozen=True)
class Source:
    """Files of one Debian package: every path in it that the regular expression finds, read in one of the four ways."""

    package: str
    licence: str
    files: str
    reader: str


SOURCES = [
    Source("anarchism", "GPL-2+ and GFDL-1.3", r"/html/.*\.html$", "html"),
    Source("apache2-doc", "Apache-2.0", r"/manual/en/.*\.html$", "html"),
    Source("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", r"/html/en-US/.*\.html$", "html"),
    Source("debian-policy", "GPL-2+", r"/policy\.html/.*\.html$", "html"),
    Source("developers-reference", "GPL-2+", r"/developers-reference/[^/]*\.html$", "html"),
    Source("dict-foldoc", "GFDL-1.3", r"\.dict\.dz$", "text"),
    Source("dict-gcide", "GPL-3+", r"\.dict\.dz$", "text"),
    Source("dict-jargon", "public domain", r"\.dict\.dz$", "text"),
    Source("erlang-doc", "Apache-2.0", r"\.html$", "html"),
    Source("fortunes", "public domain and others, all free", r"/fortunes/[a-z-]+$", "text"),
    Source("gimp-help-en", "GFDL-1.2", r"/en/.*\.html$", "html"),
    Source("git-doc", "GPL-2", r"\.txt$", "text"),
    Source("gnome-user-docs", "CC-BY-SA-3.0", r"/help/C/.*\.page$", "html"),
    Source("installation-guide-amd64", "GPL-2", r"/en/.*\.html$", "html"),
    Source("libreoffice-help-en-us", "MPL-2.0", r"\.html$", "html"),
    Source("lilypond-doc-html", "GFDL-1.3", r"/Documentation/[a-z]+/[a-z0-9-]+\.html$", "html"),
    Source("linux-doc-6.1", "GPL-2", r"/Documentation/.*\.(rst|txt)(\.gz)?$", "text"),
    Source("perl-doc", "Artistic or GPL-1+", r"\.pod$", "text"),
    Source("postgresql-doc-15", "PostgreSQL", r"\.html$", "html"),
    Source("python-astropy-doc", "BSD-3-clause", r"\.html$", "html"),
    Source("python-scipy-doc", "BSD-3-clause", r"\.html$", "html"),
    Source("python-sklearn-doc", "BSD-3-clause", r"\.html$", "html"),
    Source("python-statsmodels-doc", "BSD-3-clause", r"\.html$", "html"),
    Source("python-sympy-doc", "BSD-3-clause", r"\.html$", "html"),
    Source("python3.11-doc", "PSF-2.0", r"\.html$", "html"),
    Source("racket-doc", "Apache-2.0 or MIT", r"\.html$", "html"),
    Source("wordnet-base", "WordNet 3.0", r"/data\.(noun|verb|adj|adv)$", "wordnet"),
]


class _Prose(HTMLParser):
    """The text of a page, an empty line between blocks; scripts, navigation and footers left out."""

    # fmt: off
    BLOCKS = frozenset({
        "p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "tr", "pre", "blockquote", "section", "table",
        "title", "item", "note",
    })
    # fmt: on
    SKIPPED = frozenset({"script", "style", "nav", "head", "footer", "button", "svg", "math"})

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.skipping = [], []

    def handle_starttag(self, tag, attributes):
        if tag in self.SKIPPED:
            self.skipping.append(tag)
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag):
        if self.skipping and tag == self.skipping[-1]:
            self.skipping.pop()
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, text):
        if not self.skipping:
            self.parts.append(text)


def read(path: Path, reader: str) -> str:
    """The plain text of a file: paragraphs with an empty line between them."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":  # dictzip is gzip too
        data = gzip.decompress(data)
    text = data.decode("utf-8", "replace")
    if reader == "html":
        prose = _Prose()
        prose.feed(text)
        text = "".join(prose.parts)
    elif reader == "wordnet":  # offset file type count words... | gloss
        lines = (line.partition(" | ") for line in text.splitlines() if " | " in line)
        text = "\n\n".join(f"{line.split()[4].replace('_', ' ')}: {gloss.strip()}" for line, _, gloss in lines)
    text = re.sub(r"[ \t\xa0]+", " ", text.replace("\r", ""))
    return re.sub(r"\n\s*\n\s*", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def fetch(package: str, folder: Path) -> tuple[Path, str]:
    """Download a package and unpack it; its folder and version. What is there already is taken as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (deb,) = folder.glob(f"{package}_*.deb")
    unpacked = folder / package
    if not unpacked.exists():
        subprocess.run(["dpkg-deb", "-x", deb.name, unpacked.name], cwd=folder, check=True)
    return unpacked, deb.name.split("_")[1].replace("%3a", ":")


def documents_of(source: Source, folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """Version of the package, and its (name, text) documents, in the order of their paths."""
    unpacked, version = fetch(source.package, folder)
    paths = sorted(path for path in unpacked.rglob("*") if path.is_file() and not path.is_symlink())
    found = []
    for path in paths:
        name = str(path.relative_to(unpacked))
        if re.search(source.files, "/" + name):
            found += pieces(f"{source.package}:{name}", read(path, source.reader))
    return version, found


def pieces(name: str, text: str) -> list[tuple[str, str]]:
    """A long text cut at empty lines."""
    found, piece, length = [], [], 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        length += len(paragraph)
        if length > LONGEST_DOCUMENT:
            found.append((f"{name}#{len(found)}", "\n\n".join(piece)))
            piece, length = [], 0
    return [*found, (f"{name}#{len(found)}", "\n\n".join(piece))]


def without_repeats(documents):
    """Drop paragraphs that are short or stood in the corpus before (menus, notices, two copies of a page), then what
    is left of documents that are short or not mostly ASCII. So no paragraph is in both training and validation."""
    seen = set()
    for name, text in documents:
        kept = []
        for paragraph in text.split("\n\n"):
            key = hashlib.blake2b(re.sub(r"\W+", "", paragraph).lower().encode(), digest_size=8).digest()
            if len(paragraph) >= SHORTEST_PARAGRAPH and key not in seen:
                kept.append(paragraph)
                seen.add(key)
        text = "\n\n".join(kept)
        if len(text) >= SHORTEST_DOCUMENT and sum(character.isascii() for character in text) > 0.95 * len(text):
            yield name, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--debs", type=Path, default=Path("/tmp/quality_debs"), help="where packages are downloaded to")
    parser.add_argument("--vocabulary", type=int, default=32768, help="tokens, at most 65,536")
    parser.add_argument("--valid-tokens", type=int, default=520_000)
    parser.add_argument("--most-tokens", type=int, default=27_000_000, help="of the training text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(documents_of, SOURCES, [args.debs] * len(SOURCES)))
    documents, packages = [], {}
    for source, (version, of_package) in zip(SOURCES, found, strict=True):
        packages[source.package] = {"version": version, "licence": source.licence, "characters": 0, "documents": 0}
        documents += of_package
    documents = list(without_repeats(documents))
    for name, text in documents:
        entry = packages[name.partition(":")[0]]
        entry["characters"] += len(text)
        entry["documents"] += 1
    for package, entry in packages.items():
        print(f"{package:28s} {entry['documents']:6d} documents {entry['characters'] / 1e6:6.1f} MB")
    print(f"in all {sum(len(text) for _, text in documents) / 1e6:.1f} MB", flush=True)

    random.Random(0).shuffle(documents)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (text for _, text in documents[:: max(1, len(documents) // 8000)]),
        vocab_size=args.vocabulary, min_frequency=2, special_tokens=[END], show_progress=False,
    )  # fmt: skip
    tokenizer.save(str(args.out / "tokenizer.json"))
    if tokenizer.get_vocab_size() != args.vocabulary:
        sys.exit(f"the text gave {tokenizer.get_vocab_size()} tokens, not {args.vocabulary}: ask for fewer")

    parts, sizes, hashes = {"valid": [], "train": []}, {"valid": 0, "train": 0}, {}
    limits = {"valid": args.valid_tokens, "train": args.most_tokens}
    for first in range(0, len(documents), 500):
        texts = [text for _, text in documents[first : first + 500]]
        for encoding in tokenizer.encode_batch(texts):
            part = "valid" if sizes["valid"] < limits["valid"] else "train"
            if sizes[part] < limits[part]:
                parts[part].append(np.array([*encoding.ids, 0], np.uint16))  # 0 is <|endoftext|>
                sizes[part] += len(parts[part][-1])
    for part, arrays in parts.items():
        data = np.concatenate(arrays).tobytes()
        (args.out / f"text_{part}.u16").write_bytes(data)
        hashes[part] = hashlib.sha256(data).hexdigest()
        print(f"{part}: {sizes[part]:,} tokens, {len(arrays):,} documents")
    record = {"vocabulary": args.vocabulary, "tokens": sizes, "sha256": hashes, "packages": packages}
    (args.out / "text.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
