"""Whether our hub speaks the protocol: the real client lists, downloads, resumes and is refused.

usage: judge.py URL FOLDER
"""

import hashlib
import os
import pathlib
import sys
import tempfile

url, folder = sys.argv[1], pathlib.Path(sys.argv[2])
os.environ |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: E402
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError  # noqa: E402

REPO = "house/nano-GGUF"
LARGE = "scout-nano-q4_0.gguf"


def refused(error, act):
    try:
        act()
    except error:
        return
    sys.exit(f"not refused with {error.__name__}")


def digest(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


info = HfApi(endpoint=url).model_info(REPO, files_metadata=True)
siblings = {sibling.rfilename: sibling for sibling in info.siblings}
source = folder / REPO / LARGE
assert siblings[LARGE].lfs.sha256 == digest(source) and siblings[LARGE].size == source.stat().st_size
assert siblings["README.md"].lfs is None and info.card_data.license == "apache-2.0"

with tempfile.TemporaryDirectory() as place:
    # Into a folder with a cache: the client checks size and ETag itself.
    path = hf_hub_download(REPO, LARGE, endpoint=url, cache_dir=place)
    assert digest(path) == digest(source)
    everything = snapshot_download(REPO, endpoint=url, local_dir=f"{place}/all")
    assert (pathlib.Path(everything) / "README.md").read_text() == "# nano\n"
    refused(EntryNotFoundError, lambda: hf_hub_download(REPO, "nothing", endpoint=url, cache_dir=place))
    refused(RevisionNotFoundError, lambda: HfApi(endpoint=url).model_info(REPO, revision="v9"))
    refused(RepositoryNotFoundError, lambda: HfApi(endpoint=url).model_info("house/nothing"))
print("the real client is content with the hub")
