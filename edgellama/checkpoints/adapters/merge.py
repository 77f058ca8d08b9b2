"""Merging: a checkpoint whose weights are computed from base and adapters when they are read, in float32.

The weights are merged from the full-precision base, before anything is calibrated or rounded. Merging into a
quantized base would round twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from edgellama.checkpoints.adapters.adapter import Adapter, LowRank
from edgellama.checkpoints.adapters.read import open_adapter
from edgellama.checkpoints.checkpoint import Checkpoint, MergedAdapter, TensorInfo
from edgellama.errors import CheckpointError
from edgellama.host.adapter_files import AdapterPlace, adapter_places
from edgellama.host.threads import one_thread
from edgellama.model.config import LlamaConfig
from edgellama.text.stop_tokens import OPTION, TEMPLATE, TOKENIZER, find_stop_tokens
from edgellama.text.tokenizer import Tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OTHER_BASE = "Give the model that the adapter was trained on"


def with_adapters(checkpoint: Checkpoint, places: Sequence[str | Path | AdapterPlace]) -> Checkpoint:
    """The checkpoint with adapters merged, as one plain model.

    Args:
        checkpoint: the base, of full precision.
        places: directories, as paths or as DIR:WEIGHT. Their changes add up.

    Raises CheckpointError if the adapters do not belong to the base, or do not add up.
    """
    parsed = adapter_places(places)
    if not parsed:
        return checkpoint
    if checkpoint.given is not None and checkpoint.given.requires_as_is:
        raise CheckpointError(
            f"{checkpoint.path}: an adapter is merged into float weights, and these are codes "
            f"({checkpoint.given.origin.describe()})",
            remedy="Give the full-precision base with --adapter.",
        )
    adapters = [(place, open_adapter(place.path)) for place in parsed]
    _check_sum(adapters)
    tables = _replaced_tables(checkpoint, adapters)
    config, notes = _merged_config(checkpoint, adapters, tables)
    _check_shapes(checkpoint, config, adapters, tables)
    _check_complete(checkpoint, adapters)
    tokenizer, tokenizer_notes = _tokenizer(checkpoint, config, parsed)
    stops = checkpoint.stop_tokens
    if tokenizer is not checkpoint.tokenizer:
        stops = find_stop_tokens(_stated(checkpoint), tokenizer)
    config = replace(config, eos_token_ids=tuple(stop.id for stop in stops))
    infos = {name: _info(checkpoint, name, shape) for name, shape in config.tensor_shapes().items()}
    return checkpoint.with_options(
        config=config,
        infos=infos,
        read=_reader(checkpoint, adapters, tables),
        given=None,
        tokenizer=tokenizer,
        stop_tokens=stops,
        notes=(*checkpoint.notes, *notes, *tokenizer_notes),
        adapters=tuple(
            MergedAdapter(adapter.layout, place.weight, place.sha256(), adapter.parameters)
            for place, adapter in adapters
        ),
    )


def _check_sum(adapters: Sequence[tuple[AdapterPlace, Adapter]]) -> None:
    """Raises CheckpointError for adapters that do not add up: DoRA and whole tensors are no sums."""
    owner: dict[str, AdapterPlace] = {}
    for place, adapter in adapters:
        alone = {name for name, change in adapter.changes.items() if change.magnitude is not None}
        alone |= adapter.saved.keys()
        if alone and place.weight != 1:
            raise CheckpointError(
                f"{place.path}: {min(alone)} cannot be merged with weight {place.weight:g}: DoRA and whole modules are "
                "no sums",
                remedy="Merge this adapter with weight 1.",
            )
        for name in adapter.trained:
            other = owner.setdefault(name, place)
            if other is place:
                continue
            others = next(a for p, a in adapters if p is other)
            if name in alone or name in others.saved or others.changes[name].magnitude is not None:
                raise CheckpointError(
                    f"{place.path} and {other.path} both change {name}, and at least one replaces it (DoRA, whole modules)",
                    remedy="Such changes do not add up; merge one of the two only.",
                )


def _replaced_tables(
    checkpoint: Checkpoint, adapters: Sequence[tuple[AdapterPlace, Adapter]]
) -> dict[str, Tensor]:
    """Embedding and head that replace the base's before the training's own changes."""
    tables: dict[str, Tensor] = {}
    for place, adapter in adapters:
        for name, tensor in adapter.tables.items():
            if name in tables and not tables[name].equal(tensor):
                raise CheckpointError(
                    f"{place.path}: another adapter brings another {name}",
                    remedy="Merge one of the two only.",
                )
            tables[name] = tensor
    if checkpoint.config.tie_word_embeddings and len(tables) == 1:
        ((_, only),) = tables.items()
        tables = {EMBEDDING: only, HEAD: only}
    return tables


def _merged_config(
    checkpoint: Checkpoint, adapters: Sequence[tuple[AdapterPlace, Adapter]], tables: Mapping[str, Tensor]
) -> tuple[LlamaConfig, tuple[str, ...]]:
    """Config of the merged model, and notes on an untied head and on added tokens."""
    config, notes = checkpoint.config, []
    if config.tie_word_embeddings and _unties(adapters, tables):
        values = config.vocab_size * config.hidden_size
        notes.append(
            f"the adapter changes the embedding or its tied head alone: the two are untied, and the model grows by "
            f"{values:,} parameters"
        )
        config = replace(config, tie_word_embeddings=False)
    for _, adapter in adapters:
        sizes = {len(t) for n, t in {**tables, **adapter.saved}.items() if n in (EMBEDDING, HEAD)}
        if len(sizes) == 1 and sizes != {config.vocab_size}:
            (size,) = sizes
            notes.append(f"the adapter brings an embedding of {size} rows, the base has {config.vocab_size}")
            config = replace(config, vocab_size=size)
    for place, adapter in adapters:
        named, own = adapter.base, checkpoint.path.name
        if named is not None and Path(named).name.lower() not in (own.lower(), checkpoint.path.stem.lower()):
            notes.append(
                f"the adapter in {place.path.name} names {named!r:.80} as its base, and the base is {own}"
            )
    return config, tuple(notes)


def _unties(adapters: Sequence[tuple[AdapterPlace, Adapter]], tables: Mapping[str, Tensor]) -> bool:
    """Whether embedding and head of a tied model differ after the merge."""
    if tables and not tables[EMBEDDING].equal(tables[HEAD]):
        return True
    for _, adapter in adapters:
        touched = adapter.trained & {EMBEDDING, HEAD}
        whole = [adapter.saved[name] for name in touched if name in adapter.saved]
        kept = adapter.keeps_tie and len(whole) == len(touched) and all(t.equal(whole[0]) for t in whole)
        if touched and not kept:
            return True
    return False


def _check_shapes(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    adapters: Sequence[tuple[AdapterPlace, Adapter]],
    tables: Mapping[str, Tensor],
) -> None:
    shapes = config.tensor_shapes()
    shapes.setdefault(HEAD, shapes[EMBEDDING])  # a tied head that was trained with its embedding
    for place, adapter in adapters:
        actual: dict[str, tuple[int, ...]] = {name: c.shape for name, c in adapter.changes.items()}
        actual |= {name: tuple(t.shape) for name, t in (*adapter.saved.items(), *tables.items())}
        for name, shape in actual.items():
            if name not in shapes:
                raise CheckpointError(
                    f"{place.path}: the adapter changes {name}, and {checkpoint.path} has no such tensor",
                    remedy=f"{_OTHER_BASE}{f': {adapter.base}' if adapter.base else ''}.",
                )
            if shape != shapes[name]:
                raise CheckpointError(
                    f"{place.path}: the adapter changes {name} as {list(shape)}, and {checkpoint.path} has it as "
                    f"{list(shapes[name])}",
                    remedy=f"{_OTHER_BASE}{f': {adapter.base}' if adapter.base else ''}.",
                )
        for name, change in adapter.changes.items():
            if change.magnitude is not None and len(change.magnitude) != shapes[name][0]:
                raise CheckpointError(
                    f"{place.path}: {name} has {len(change.magnitude)} magnitudes for {shapes[name][0]} rows",
                    remedy="Take the file from the training again.",
                )
    rows = [len(tables[name]) for name in (EMBEDDING, HEAD) if name in tables]
    rows += [len(a.saved[name]) for _, a in adapters for name in (EMBEDDING, HEAD) if name in a.saved]
    changed_alone = config.vocab_size != checkpoint.config.vocab_size and len(rows) < 2
    if changed_alone and not config.tie_word_embeddings:
        raise CheckpointError(
            f"{adapters[0][0].path}: the adapter resizes the embedding or the head, and not both",
            remedy="Save both with the adapter (peft: save_embedding_layers=True).",
        )


def _check_complete(checkpoint: Checkpoint, adapters: Sequence[tuple[AdapterPlace, Adapter]]) -> None:
    """Raises CheckpointError if the weights lack a module that the adapter's config names: the file was cut off."""
    shapes, layers = checkpoint.config.tensor_shapes(), checkpoint.config.num_hidden_layers
    modules = [n.removesuffix(".weight") for n in (*shapes, HEAD) if len(shapes.get(n, (0, 0))) == 2]
    for place, adapter in adapters:
        missing = [m for m in modules if adapter.adapts(m, layers) and f"{m}.weight" not in adapter.changes]
        if missing:
            raise CheckpointError(
                f"{place.path}: the adapter's config names {len(set(missing))} modules that its weights lack: {missing[0]}",
                remedy="Take both files from one training; the weights may be cut off.",
            )


def _tokenizer(
    checkpoint: Checkpoint, config: LlamaConfig, places: Sequence[AdapterPlace]
) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer of the last adapter that brings another one, and a note about it."""
    tokenizer, notes = checkpoint.tokenizer, []
    for place in places:
        if not any((place.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            continue
        own = Tokenizer.from_directory(place.path).with_generation_config(checkpoint.tokenizer).fitted(config)
        if own.files != checkpoint.tokenizer.files:
            tokenizer = own
            notes.append(f"tokenizer and chat template are those of the adapter in {place.path.name}")
    return tokenizer, tuple(notes)


def _stated(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Stop tokens that the base's configs state, by source."""
    stated: dict[str, list[int]] = {}
    for stop in checkpoint.stop_tokens:
        for source in stop.sources:
            if source not in (TOKENIZER, TEMPLATE, OPTION):
                stated.setdefault(source, []).append(stop.id)
    return stated


def _info(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor as the base stores it. A table of another size is float32."""
    stored = checkpoint.infos.get(name, checkpoint.infos[EMBEDDING] if name == HEAD else None)
    if stored is not None and stored.shape == shape:
        return stored
    return TensorInfo("F32", shape, 4 * math.prod(shape))


def _reader(
    checkpoint: Checkpoint, adapters: Sequence[tuple[AdapterPlace, Adapter]], tables: Mapping[str, Tensor]
) -> Callable[[str], Tensor]:
    """Function from a tensor's name to the merged tensor."""
    tied = checkpoint.config.tie_word_embeddings
    whole = dict(tables)
    changes: dict[str, list[tuple[LowRank, float]]] = {}
    for place, adapter in adapters:
        whole |= adapter.saved
        if adapter.keeps_tie and tied and HEAD in adapter.saved:
            whole.setdefault(EMBEDDING, adapter.saved[HEAD])
        for name, change in adapter.changes.items():
            changes.setdefault(name, []).append((change, place.weight))

    @one_thread()
    def read(name: str) -> Tensor:
        weight = whole.get(name)
        if weight is None:
            weight = checkpoint.tensor(EMBEDDING if name == HEAD and tied else name)
        for change, factor in changes.get(name, ()):
            weight = change.applied(weight, factor)
        return weight

    return read
