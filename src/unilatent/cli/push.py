"""unilatent push"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import size_text
from ..plain_text import count_of
from .command import Record, examples
from .options import Model
from .running import find_run_folder, load

if TYPE_CHECKING:
    from ..methods.base import LatentModel

MESSAGE = "Upload a model of unilatent"


@examples(
    "unilatent push runs/digits OWNER/NAME --dry-run         # only says what",
    "unilatent push runs/digits OWNER/NAME --licence apache-2.0 --private",
)
def run(
    model: Model,
    repo: Annotated[str, typer.Argument(help="The model on the Hugging Face Hub: owner/name.", metavar="OWNER/NAME")],
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence", "--license", help="Licence of the weights, as the hub names it: apache-2.0, mit, ..."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Store the weights as float16 or bfloat16, half the size [default: float32].")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", "--branch", help="Branch [default: main].")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = MESSAGE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files and the card, and what they lack; upload nothing.")
    ] = False,
) -> Record:
    """Upload a model with its card to the Hugging Face Hub.

    The card has the numbers of all evaluations of exactly these weights with their protocols, images, the data and the
    licences. Log in first: `hf auth login`, or the variable HF_TOKEN.
    """
    from ..model_folder import portable
    from ..pretrained import offline

    _check_name(repo)
    if not dry_run and (variable := offline()):
        raise ValueError(f"push: {variable} forbids the network; unset it, or look with --dry-run")
    network = load(model, "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo.rpartition("/")[2]
        network.config = portable(network.config)
        network.save_pretrained(folder, dtype=dtype, licence=licence, name=repo)
        _take_own_card(model, folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        lacks = list(_lacks(folder, network))
        for line in lacks:
            print(f"note: {line}", file=sys.stderr)
        record: Record = {"repo": repo, "files": sizes, "lacks": lacks, "uploaded": None}
        if dry_run:
            for name, size in sizes.items():
                print(f"{size_text(size):>10}  {name}")
            print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}")
            print(f"would be uploaded to {repo}: {count_of(len(sizes), 'file')}, {size_text(sum(sizes.values()))}")
            return record
        record["uploaded"] = _upload(folder, repo, private, revision, message)
    print(f"{count_of(len(sizes), 'file')}, {size_text(sum(sizes.values()))}: {record['uploaded']}")
    print(f'load it with unilatent.load("{repo}")')
    return record


def _check_name(repo: str) -> None:
    """ValueError unless a name can be that of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(f"OWNER/NAME: {repo!r} is no name of a model; give one like jane/digits")


def _take_own_card(source: str, folder: Path) -> None:
    """Put the card that somebody wrote beside the model in the place of the generated one."""
    from ..model_card import CARD, is_untouched

    run = find_run_folder(source)
    card = (run / "model" if run else Path(source).expanduser()) / CARD
    if card.is_file() and not is_untouched(card):
        shutil.copyfile(card, folder / CARD)


def _lacks(folder: Path, model: LatentModel) -> Iterator[str]:
    """What readers of the card will miss."""
    from ..model_card import read_record
    from ..model_folder import places

    for field, place in places(model.config.plain()):
        yield f"{field} is {place}, a place on this machine, which readers lack: give a hub id, or say where to get it"
    record = read_record(folder)
    if record is None or not record.numbers:
        rounded = ", or leave --dtype out: rounded weights have numbers of their own" if model.known else ""
        yield f"no numbers: evaluate the model first (unilatent evaluate){rounded}"
    if record is None or record.licence is None:
        yield "no licence of the weights: give --licence"
    if record is None or not record.data.get("origin"):
        yield "nothing is recorded of the origin and the licence of the data: write it into the card"


def _upload(folder: Path, repo: str, private: bool, revision: str | None, message: str) -> str:
    """Create the repository if it is not there and upload the folder; return the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="unilatent")
    with _one_line(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ValueError(
                f"--private: {repo} is there already, and is public; make it private in its settings on the hub, or "
                "give another name. Nothing was uploaded"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, revision=revision))


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """ValueError in one line of what the hub refuses."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise ValueError(f"{repo}: not logged in; run `hf auth login` or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        known = {401: "not logged in, or the token is not valid; run `hf auth login` or set HF_TOKEN",
                 403: "the token may not write there; use one with the right to write, or another OWNER"}  # fmt: skip
        reason = known.get(status) or " ".join((error.server_message or str(error)).split())[:200]
        raise ValueError(f"{repo}: the hub refused ({status}): {reason}") from None
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{repo}: the hub cannot be reached ({type(error).__name__}: {reason}); try again") from None
