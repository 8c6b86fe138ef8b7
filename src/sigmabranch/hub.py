"""Networks on the Hugging Face Hub: JSON and safetensors, with a card that says what was measured.

Only the three files of a saved network travel down, and each is checked against the manifest.
Names, revisions, the cache, log-in and the offline switch are those of huggingface_hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from sigmabranch.archive import MANIFEST, WEIGHTS, read_manifest
from sigmabranch.backbones import Backbone, source_of
from sigmabranch.card import Figures, card_text
from sigmabranch.errors import CheckpointError, MissingDependency, SigmaBranchError
from sigmabranch.net import RECORD, SigmaBranchNet
from sigmabranch.saving import load, save_dense

CARD = "README.md"
_IMAGE_BUILDERS = ("convnext", "resnet", "timm", "vit", "wide-resnet")
_LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


def push_to_hub(
    net: nn.Module | Path | str,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    **card: Any,
) -> str:
    """Upload a network and its card in one commit; the card there is written anew.

    Args:
        net: the network, branched or dense, or the folder it was saved in, whose notes then go
            along.
        repo_id: ``"user/name"``, created if absent.
        revision: branch, created if absent; the main one if None.
        private: of a repository that is created; None leaves it to the account's setting.
        commit_message: of the commit.
        card: figures and licence for :func:`model_card`.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: the folder holds no whole network, or the Hub refuses or cannot
            be reached.
        ConfigError: figures of another network.
        MissingDependency: huggingface_hub is not installed.
    """
    hub = _hub()
    with ExitStack() as stack:
        if isinstance(net, nn.Module):
            folder = Path(stack.enter_context(TemporaryDirectory()))
            net.save(folder) if isinstance(net, SigmaBranchNet) else save_dense(net, folder)
        else:
            folder = Path(net)
        model = net if isinstance(net, nn.Module) else load(net)
        text = model_card(model, repo_id=repo_id, **card)
        names = (*read_manifest(folder)["files"], MANIFEST)
        additions = [hub.CommitOperationAdd(CARD, text.encode())]
        additions += [hub.CommitOperationAdd(name, folder / name) for name in names]
        stack.enter_context(_refusals(repo_id, revision))
        api = hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise CheckpointError(f"{repo_id} exists and is public: choose another name")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            additions,
            commit_message=commit_message or "Upload a network with sigmabranch",
            revision=revision,
        )
        return str(commit.commit_url)


def from_hub(
    repo_id: str, revision: str | None = None, skeleton: nn.Module | Backbone | None = None
) -> Any:
    """Download a network, or take it from the cache, and load it as :func:`sigmabranch.load` does.

    Args:
        repo_id: ``"user/name"``.
        revision: branch, tag or commit; the main branch if None.
        skeleton: as for :func:`~sigmabranch.saving.load`.

    Raises:
        CheckpointError: no such network, no way to it, or files that are not as they were written.
        MissingDependency: huggingface_hub is not installed.
    """
    hub = _hub()
    with _refusals(repo_id, revision):
        folder = hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=[MANIFEST, WEIGHTS, RECORD]
        )
    try:
        return load(folder, skeleton)
    except CheckpointError as error:
        raise CheckpointError(f"{repo_id} on the Hub: {error}") from error


def model_card(
    net: nn.Module,
    *,
    evaluation: Figures | None = None,
    dense_evaluation: Figures | None = None,
    cost: Figures | None = None,
    dataset: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> str:
    """A model card in Markdown with the Hub's header, written without network.

    Args:
        net: the network; its parameters are counted here.
        evaluation: from :func:`sigmabranch.evaluate`.
        dense_evaluation: of the dense network, from :func:`sigmabranch.evaluate_dense`.
        cost: from :func:`sigmabranch.count`, with ``dense`` for the dense network's size.
        dataset: name of the data that the evaluations are of.
        license: identifier of the Hub, such as ``"mit"``; left out if None.
        repo_id: ``"user/name"``, for the title and the lines that load it.

    Raises:
        ConfigError: figures of another network.
        MissingDependency: huggingface_hub is not installed.
    """
    body = card_text(
        net,
        repo_id,
        evaluation=evaluation,
        dense_evaluation=dense_evaluation,
        cost=cost,
        dataset=dataset,
    )
    header = _header(net, evaluation, dataset, license, repo_id)
    return f"---\n{header}\n---\n\n{body}"


def _header(
    net: nn.Module,
    evaluation: Figures | None,
    dataset: str | None,
    license: str | None,
    repo_id: str | None,
) -> str:
    hub = _hub()
    task = _pipeline_tag(net.source if isinstance(net, SigmaBranchNet) else source_of(net))
    results = []
    if evaluation is not None and dataset is not None and task is not None:
        results.append(
            hub.EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="accuracy",
                metric_value=round(evaluation["top1"] / 100, 6),
            )
        )
    data = hub.ModelCardData(
        library_name="sigmabranch",
        license=license,
        pipeline_tag=task,
        tags=["sigma-branch", "dynamic-inference", "conditional-computation"],
        metrics=None if evaluation is None else ["accuracy"],
        model_name=(repo_id or "sigma-branch") if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _pipeline_tag(source: Mapping[str, Any] | None) -> str | None:
    """The Hub's word for what the network does, where its builder tells; it has none for clouds."""
    builder = None if source is None else source.get("builder")
    return "image-classification" if builder in _IMAGE_BUILDERS else None


def _hub() -> Any:
    try:
        import huggingface_hub  # noqa: PLC0415 (an optional package)
    except ImportError as error:
        raise MissingDependency("huggingface-hub", "hub", "The Hugging Face Hub") from error
    return huggingface_hub


@contextmanager
def _refusals(repo_id: str, revision: str | None) -> Iterator[None]:
    """Whatever the Hub, or the way to it, has against a request becomes one line."""
    try:
        yield
    except SigmaBranchError:
        raise
    # Its own errors, its HTTP client's and those of its transfers have no base in common.
    except Exception as error:
        reason = _reason(error, revision) or (
            f"{' '.join(f'{type(error).__name__}: {error}'.split())[:200]}; "
            "check the name and the connection"
        )
        raise CheckpointError(f"{repo_id} on the Hub: {reason}") from error


def _reason(error: Exception, revision: str | None) -> str | None:
    """What to do about the errors that a user can meet."""
    from huggingface_hub import errors  # noqa: PLC0415 (an optional package)

    # The client looks into its cache before it gives up, and then raises from the refusal.
    answers = (getattr(part, "response", None) for part in (error, error.__cause__))
    refused = any(getattr(answer, "status_code", None) in (401, 403) for answer in answers)
    if isinstance(error, errors.GatedRepoError):
        return f"it is open only to some: ask for access on its page, and {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or not for you: check the name, or {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision!r}: name a branch, a tag or a commit of it"
    if isinstance(error, errors.LocalTokenNotFoundError) or refused:
        return f"refused: {_LOG_IN}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "out of reach, and not in the cache: check the connection, and HF_HUB_OFFLINE"
    return None
