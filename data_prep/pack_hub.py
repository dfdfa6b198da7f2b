"""Upload a packed set to a Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from equifeat.errors import MissingExtraError, PackError


def push_folder(folder: Path, repo: str, private: bool = True, endpoint: str | None = None) -> str:
    """Upload a packed set; what is already there is not sent again.

    The hub's address, token and cache are those of huggingface_hub (HF_ENDPOINT, HF_TOKEN or
    ``hf auth login``).

    Args:
        folder: A finished packed set.
        repo: Dataset repository, USER/NAME; it is made when it does not exist.
        private: Whether a repository that is made is private.
        endpoint: Address of the hub; None for huggingface_hub's own.

    Returns:
        One line that says where it is.

    Raises:
        PackError: The hub refuses or cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
        )
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "pack", "--push_to_hub") from error

    api = HfApi(endpoint=endpoint)
    again = "the packed set is complete: run the same command again to go on with the upload"
    try:
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            repo_type="dataset",
            commit_message="equifeat pack",
            ignore_patterns=[".packing/**", "**/.tmp_*"],
        )
    except HFValidationError as error:
        raise PackError(f"push_to_hub {repo!r} is not USER/NAME of a dataset repository") from error
    except (LocalTokenNotFoundError, HfHubHTTPError, RuntimeError) as error:
        # huggingface_hub wraps an upload that was refused in a RuntimeError
        first = " ".join(str(error).split())[:200]
        raise PackError(
            f"the hub refused {repo!r} ({first}); log in with `hf auth login` or set HF_TOKEN; "
            f"{again}"
        ) from error
    except Exception as error:  # the client's HTTP library differs by its version
        raise PackError(f"{api.endpoint} cannot be reached ({error}); {again}") from error
    return f"uploaded to {url}"
