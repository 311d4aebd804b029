"""Asks the model hub, through its own client, what a model consists of and whether this account may have it."""

from fnmatch import fnmatch

from replica.store.cache import File, Manifest
from replica.store.errors import StoreError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")  # the first kind that there is, is fetched
# The same weights once more, for other programs.
_FOR_OTHERS = ("*.msgpack", "*.h5", "*.onnx", "*.ot", "*.tflite", "*.mlmodel", "original/*", "onnx/*", "openvino/*")


def look_up(repo: str, revision: str, token: str | None, with_weights: bool = True) -> tuple[Manifest, str]:
    """What there is to fetch, and the model's licence in the hub's word (empty: it names none).

    Raises StoreError where the hub does not have it or does not give it, OSError where the hub is out of reach.
    """
    import httpx2
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, token=token, timeout=20)
        files = tuple(
            File(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else one.blob_id)
            for one in info.siblings or ()
            if one.blob_id
        )
        wanted = select(files, with_weights)
        if not wanted:
            raise StoreError(f"{repo} has no files on the hub")
        # A gated model's list is for everyone; only asking for a file tells whether this account may have it.
        smallest = min(wanted, key=lambda file: file.size)
        url = hf_hub_url(repo, smallest.path, revision=info.sha)
        get_hf_file_metadata(url, token=token, timeout=20)
    except (GatedRepoError, LocalTokenNotFoundError):
        raise StoreError(
            f"{repo} is gated: accept its licence on its Hugging Face page, then set HF_TOKEN (or HF_TOKEN_FILE) to a "
            "token of that account"
        ) from None
    except RevisionNotFoundError:
        raise StoreError(f"{repo} has no version {revision} on the hub: give a branch, a tag or a commit") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise StoreError(
            f"there is no model {repo} on the hub, or it is private: check the name, or set HF_TOKEN to a token that "
            "may read it"
        ) from None
    except HfHubHTTPError as error:
        raise OSError(f"the hub answers {error.response.status_code}") from None
    except httpx2.HTTPError as error:
        raise OSError(str(error) or type(error).__name__) from None
    licence = str(info.card_data.get("license") or "") if info.card_data else ""
    return Manifest(repo, revision, str(info.sha), wanted), licence


def select(files: tuple[File, ...], with_weights: bool = True) -> tuple[File, ...]:
    """All that is no weights, and of weights in several formats the one that SGLang takes."""
    files = tuple(file for file in files if not any(fnmatch(file.path, pattern) for pattern in _FOR_OTHERS))
    kinds = [kind for kind in _WEIGHTS if any(fnmatch(file.path, kind) for file in files)]
    unwanted = kinds[1:] if with_weights else kinds
    return tuple(file for file in files if not any(fnmatch(file.path, kind) for kind in unwanted))


def address_of(repo: str, commit: str, file: File, token: str | None) -> tuple[str, dict[str, str]]:
    """Where a file's bytes are, and the header fields to ask for them with."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    return hf_hub_url(repo, file.path, revision=commit), build_hf_headers(token=token)
