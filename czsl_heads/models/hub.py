"""Models in folders and on the Hugging Face Hub: what was trained, and the name and digest of the CLIP around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download

if TYPE_CHECKING:
    from czsl_heads.models.recipe import Recipe

_Model = TypeVar("_Model", bound="Saved")


class Saved(PyTorchModelHubMixin, library_name="czsl-heads", tags=["compositional-zero-shot-learning", "clip"]):
    """Gives a model ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Attributes:
        recipe: What the model was built from; None for one that was put together by hand, which cannot be saved.
        encoder_digest: Of the weights of its CLIP, before anything was trained.
        learned: Names of the tensors that training changes.
        record: What is known of its training, as plain values; it goes into the model card.
    """

    recipe: Recipe | None = None
    encoder_digest: str = ""
    learned: list[str] = []  # noqa: RUF012 (replaced, never changed)
    record: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the model into a folder, as :func:`czsl_heads.load` reads it; what stood there is replaced.

        Args:
            save_directory: The folder, which is made where there is none.
            options: Of ``huggingface_hub.PyTorchModelHubMixin``.

        Raises:
            ValueError: The model was put together by hand, or is no longer as its recipe says.
        """
        from czsl_heads.models.saved import check_built

        check_built(self)  # type: ignore[arg-type]  # before anything in the folder is touched
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face Hub, and return the address of the commit.

        Args:
            repo_id: The name there, ``"user/model"``; it is made where there is none.
            options: Of ``huggingface_hub.PyTorchModelHubMixin``, such as ``private`` or ``commit_message``.

        Raises:
            ValueError: As :meth:`save_pretrained`.
        """
        from czsl_heads.models.saved import check_built

        check_built(self)  # type: ignore[arg-type]  # before there is an empty place for it
        link: str = super().push_to_hub(repo_id, **options)
        return link

    def _save_pretrained(self, save_directory: Path) -> None:
        from czsl_heads.models.saved import save_model

        save_model(self, save_directory)  # type: ignore[arg-type]

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that :func:`czsl_heads.models.card.model_card` writes."""
        from czsl_heads.models.card import model_card

        return ModelCard(model_card(self))  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls: type[_Model], pretrained_model_name_or_path: str | Path, **options: Any) -> _Model:
        """A saved model in eval mode, from a folder or from the Hugging Face Hub. Errors as :func:`czsl_heads.load`.

        Args:
            pretrained_model_name_or_path: The folder, or the name on the Hub, ``"user/model"``.
            options: Of ``huggingface_hub.PyTorchModelHubMixin``, such as ``revision``.

        Raises:
            TypeError: It is a model of another method than this class.
        """
        if Path(pretrained_model_name_or_path).is_dir():  # whose configuration is read, and doubted, by our own reader
            return cls._from_pretrained(model_id=str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(
        cls: type[_Model],
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **_: Any,
    ) -> _Model:
        from czsl_heads.models.saved import load

        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        model: Any = load(folder)
        method = getattr(model, "method", model)
        if not (isinstance(model, cls) or isinstance(method, cls)):
            raise TypeError(f"expected {model_id} to hold a {cls.__name__}, got a {type(method).__name__}")
        return model  # type: ignore[no-any-return]
