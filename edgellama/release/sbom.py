"""Bill of materials of a bundle in CycloneDX 1.6, with a machine-learning model and its card.

The library of CycloneDX writes components and their relations. It has no model cards, so the card is added to
its output. Equal bundles give equal bytes: the serial number is made of the manifest's hash, and there is no
time of day.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.bundle.reports import export_report
from edgellama.files import file_sha256, to_json
from edgellama.release.extras import extra

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

_MODEL = "model"  # bom-ref of the bundle's model
# Figures of the gate's headline, by key of the manifest.
_METRICS = {
    "kl_mean": "mean KL divergence from the checkpoint, nats per token",
    "top1_agreement": "agreement of the most probable token with the checkpoint",
    "ppl_reference": "perplexity of the checkpoint",
    "ppl_artifact": "perplexity of the artifact",
}


def bill_of_materials(bundle: Bundle) -> str:
    """The bundle's bill of materials as JSON text. Files are not read, besides manifest and export report.

    >>> import json
    >>> found = json.loads(bill_of_materials(bundle))
    >>> found["bomFormat"], found["metadata"]["component"]["type"]
    ('CycloneDX', 'machine-learning-model')
    """
    with extra("sbom", purpose="a bill of materials"):
        from cyclonedx.output.json import JsonV1Dot6
    parts = _Parts(bundle)
    data = json.loads(JsonV1Dot6(parts.bom()).output_as_string())
    del data["metadata"]["timestamp"]
    data["metadata"]["component"]["modelCard"] = _model_card(bundle, [ref for ref, _ in parts.datasets])
    return to_json(data)


class _Parts:
    """Components of a bundle by role, as (bom-ref, component)."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        source = bundle.manifest["source"]
        self.sources = [("source", self._source(source))]
        merged = {
            f"merged/{i}": (f"merged adapter {i}", a) for i, a in enumerate(source.get("adapters", ()), 1)
        }
        switched = {f"adapter/{a['name']}": (a["name"], a) for a in bundle.manifest.get("adapters", ())}
        self.adapters = [
            (ref, self._adapter(ref, name, entry)) for ref, (name, entry) in (merged | switched).items()
        ]
        self.datasets = list(self._datasets())
        self.files = [
            (f"file/{path}", self._file(path, entry["sha256"]))
            for path, entry in sorted(bundle.manifest["files"].items())
        ]

    def bom(self) -> Bom:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.model.tool import ToolRepository
        from packageurl import PackageURL

        manifest_hash = file_sha256(self.bundle.path / MANIFEST)
        tools = [
            Component(
                name=name,
                version=version,
                type=ComponentType.LIBRARY,
                bom_ref=f"tool/{name}",
                purl=PackageURL("pypi", name=name, version=version.partition("+")[0]),
            )
            for name, version in sorted(self.bundle.manifest["tools"].items())
        ]
        model = self._model(manifest_hash)
        bom = Bom(
            serial_number=uuid5(NAMESPACE_URL, f"urn:edgellama:manifest:{manifest_hash}"),
            metadata=BomMetaData(component=model, tools=ToolRepository(components=tools)),
            components=[c for group in self._groups() for _, c in group],
        )
        bom.register_dependency(model, [c for group in self._groups() for _, c in group])
        return bom

    def _groups(self) -> list[list[tuple[str, Component]]]:
        return [self.sources, self.adapters, self.datasets, self.files]

    def _component(self, kind: str, ref: str, name: str, sha256: str, **more: Any) -> Component:
        from cyclonedx.model import HashAlgorithm, HashType
        from cyclonedx.model.component import Component, ComponentType

        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]
        return Component(name=name, type=ComponentType(kind), bom_ref=ref, hashes=hashes, **more)

    def _model(self, manifest_hash: str) -> Component:
        manifest = self.bundle.manifest
        return self._component(
            "machine-learning-model",
            _MODEL,
            manifest["name"],
            manifest_hash,
            description=f"{manifest['source']['architecture']} model for {', '.join(self.bundle.targets)}",
            licenses=self._licenses(),
            properties=_properties(
                {
                    "hash_of": MANIFEST,
                    "recipe": manifest["recipe"]["name"],
                    "algorithm": manifest["recipe"]["algorithm"],
                    "context_length": self.bundle.context_length,
                    "parameters": manifest["source"]["parameters"],
                }
            ),
        )

    def _source(self, source: Mapping[str, Any]) -> Component:
        from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri

        hub = source.get("hub")
        reference = (
            () if hub is None else (f"https://huggingface.co/{hub['repository']}/tree/{hub['revision']}",)
        )
        return self._component(
            "machine-learning-model",
            "source",
            "checkpoint" if hub is None else hub["repository"],
            source["sha256"],
            version=None if hub is None else hub["revision"],
            licenses=self._licenses(),
            external_references=[
                ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(url))
                for url in reference
            ],
            properties=_properties({"format": source["format"], "hash_of": "hashes of the weight files"}),
        )

    def _adapter(self, ref: str, name: str, entry: Mapping[str, Any]) -> Component:
        keys = ("layout", "weight", "rank", "parameters")
        return self._component(
            "machine-learning-model",
            ref,
            name,
            entry["sha256"],
            properties=_properties({key: entry[key] for key in keys if key in entry}),
        )

    def _datasets(self) -> Iterator[tuple[str, Component]]:
        calibration = export_report(self.bundle).get("calibration")
        if calibration is None:
            return
        texts = ", ".join(text["name"] for text in calibration["texts"])
        yield (
            "dataset/calibration",
            self._component(
                "data",
                "dataset/calibration",
                f"calibration: {texts}",
                calibration["sha256"],
                properties=_properties({"tokens": calibration["tokens"], "windows": calibration["windows"]}),
            ),
        )

    def _file(self, path: str, sha256: str) -> Component:
        return self._component("file", f"file/{path}", path, sha256)

    def _licenses(self) -> list[Any]:
        from cyclonedx.contrib.license.factories import LicenseFactory

        name = self.bundle.manifest["source"]["license"]
        return [] if not name else [LicenseFactory().make_from_string(name)]


def _properties(values: Mapping[str, Any]) -> list[Any]:
    from cyclonedx.model import Property

    return [Property(name=f"edgellama:{name}", value=str(value)) for name, value in values.items()]


def _model_card(bundle: Bundle, datasets: list[str]) -> dict[str, Any]:
    """The model card, as CycloneDX has it: what the model is, and the gate's figures."""
    metrics = [
        {"type": label, "value": str(row[key]), "slice": target, **_interval(row.get(f"{key}_ci95"))}
        for target, row in sorted(bundle.manifest["accuracy"].items())
        for key, label in _METRICS.items()
        if row.get(key) is not None
    ]
    source = bundle.manifest["source"]
    parameters: dict[str, Any] = {
        "task": "text-generation",
        "architectureFamily": source["architecture"],
        "inputs": [{"format": "text"}],
        "outputs": [{"format": "text"}],
        "datasets": [{"ref": ref} for ref in datasets],
    }
    return {
        "modelParameters": parameters,
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
    }


def _interval(bounds: list[float | None] | None) -> dict[str, Any]:
    if not bounds or None in bounds:
        return {}
    return {"confidenceInterval": {"lowerBound": str(bounds[0]), "upperBound": str(bounds[1])}}
