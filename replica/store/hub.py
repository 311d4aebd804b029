"""Asks the model hub, by its own client, for a model's files and whether this account may download them."""

from fnmatch import fnmatch

from replica.store.cache import File, Manifest
from replica.store.errors import StoreError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")  # only the first format that exists is fetched
# The same weights in formats for other programs.
_FOR_OTHERS = ("*.msgpack", "*.h5", "*.onnx", "*.ot", "*.tflite", "*.mlmodel", "original/*", "onnx/*", "openvino/*")


def look_up(repo: str, revision: str, token: str | None, with_weights: bool = True) -> tuple[Manifest, str]:
    """The files to fetch, and the model's licence as the hub names it (empty: none).

    Raises StoreError if the hub does not have or does not release the model, OSError if the hub cannot be reached.
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
        # Anybody may list a gated model's files; only a request for a file shows whether this account may download it.
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
    """All files except weights, and the weights in the one format that SGLang prefers."""
    files = tuple(file for file in files if not any(fnmatch(file.path, pattern) for pattern in _FOR_OTHERS))
    kinds = [kind for kind in _WEIGHTS if any(fnmatch(file.path, kind) for file in files)]
    unwanted = kinds[1:] if with_weights else kinds
    return tuple(file for file in files if not any(fnmatch(file.path, kind) for kind in unwanted))


def address_of(repo: str, commit: str, file: File, token: str | None) -> tuple[str, dict[str, str]]:
    """The URL of a file, and the header fields for the request."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    return hf_hub_url(repo, file.path, revision=commit), build_hf_headers(token=token)
