"""Real images."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from proxyrob.config.base import Config, Count

NumValidation = Annotated[int, Field(gt=0, description="images for any selection, cut from the training images")]
NumTrain = Annotated[int | None, Field(gt=0, description="training images to use; all that validation leaves when not set")]
NumTest = Annotated[int | None, Field(gt=0, description="test images to use, the first ones; all when not set")]
Fingerprint = Annotated[
    str | None,
    Field(pattern=r"^[0-9a-f]{64}$", description="sha256 over the content of the files, filled in when a run begins"),
]


class DigitsSource(Config):
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8, ten classes, shipped inside the dependency."""

    kind: Literal["digits"] = "digits"
    num_train: Annotated[int, Field(gt=0, description="real images the models and the proxy are trained on")] = 200
    num_validation: Annotated[int, Field(gt=0, description="images for any selection, cut from the training side")] = 300
    num_test: Count = 797

    @property
    def dataset(self) -> str:
        """What models trained on it are named after."""
        return self.kind

    @property
    def known_train(self) -> int | None:
        """The number of training images."""
        return self.num_train

    @property
    def known_test(self) -> int | None:
        """The number of test images."""
        return self.num_test

    @property
    def known_values(self) -> int | None:
        """The number of values of an image."""
        return 8 * 8


class CifarSource(Config):
    """What the CIFAR data sets share: 50,000 training and 10,000 test images of 32×32 in colour (Krizhevsky 2009).

    torchvision downloads them, unless ``path`` is a folder with parquet files in the hub's layout. Where that folder holds
    several sets, ``train_file`` and ``test_file`` say which.
    """

    MEANS: ClassVar[frozenset[str]] = frozenset({"path", "train_file", "test_file"})
    FULL_TRAIN: ClassVar[int] = 50_000
    FULL_TEST: ClassVar[int] = 10_000

    num_train: NumTrain = None
    num_validation: NumValidation = 1024
    num_test: NumTest = None
    path: Annotated[str | None, Field(description="folder with train*.parquet and test*.parquet; a download when not set")] = (
        None
    )
    train_file: Annotated[str | None, Field(description="name or pattern of the training file below path")] = None
    test_file: Annotated[str | None, Field(description="name or pattern of the test file below path")] = None
    sha256: Fingerprint = None

    @model_validator(mode="after")
    def _consistent(self) -> "CifarSource":
        given = [name for name in ("train_file", "test_file", "sha256") if getattr(self, name) is not None]
        if self.path is None and given:
            raise ValueError(f"{', '.join(given)} has no effect without path; give the folder, or leave {given[0]} out")
        return self

    @property
    def known_train(self) -> int | None:
        """The number of training images, where it is known before the files are read."""
        full = None if self.path else self.FULL_TRAIN - self.num_validation
        return self.num_train or full

    @property
    def known_test(self) -> int | None:
        """The number of test images, where it is known before the files are read."""
        return self.num_test or (None if self.path else self.FULL_TEST)

    @property
    def known_values(self) -> int | None:
        """The number of values of an image: channels, height and width multiplied."""
        return 3 * 32 * 32

    @property
    def files(self) -> tuple[str, str] | None:
        """Where the training and the test images lie: two files or patterns, or ``None`` for a download."""
        if self.path is None:
            return None
        train, test = self.train_file or "train*.parquet", self.test_file or "test*.parquet"
        return str(Path(self.path) / train), str(Path(self.path) / test)


class Cifar10Source(CifarSource):
    """CIFAR-10."""

    kind: Literal["cifar10"] = "cifar10"

    @property
    def dataset(self) -> str:
        """What models trained on it are named after."""
        return self.kind


class Cifar100Source(CifarSource):
    """CIFAR-100, with its hundred fine classes."""

    kind: Literal["cifar100"] = "cifar100"

    @property
    def dataset(self) -> str:
        """What models trained on it are named after."""
        return self.kind


class Cifar2Source(CifarSource):
    """CIFAR-10's automobiles against its trucks: 10,000 training and 2,000 test images (Sehwag et al. 2021).

    ``path`` and its files are those of CIFAR-10.
    """

    FULL_TRAIN: ClassVar[int] = 10_000
    FULL_TEST: ClassVar[int] = 2_000

    kind: Literal["cifar2"] = "cifar2"

    @property
    def dataset(self) -> str:
        """What models trained on it are named after."""
        return self.kind


class GivenSource(Config):
    """What the user's own data sets share: training and test images in files of the same layout."""

    MEANS: ClassVar[frozenset[str]] = frozenset({"train", "test"})

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="the data set, which models are named after")]
    train: Annotated[str, Field(description="where the training images lie")]
    test: Annotated[str, Field(description="where the test images lie")]
    num_train: NumTrain = None
    num_validation: NumValidation = 1000
    num_test: NumTest = None
    class_names: Annotated[
        tuple[str, ...] | None,
        Field(min_length=2, description="in the order of the labels; the files' own, or numbers, when not set"),
    ] = None
    sha256: Fingerprint = None

    @property
    def dataset(self) -> str:
        """What models trained on it are named after."""
        return self.name

    @property
    def known_train(self) -> int | None:
        """The number of training images, where it is known before the files are read."""
        return self.num_train

    @property
    def known_test(self) -> int | None:
        """The number of test images, where it is known before the files are read."""
        return self.num_test

    @property
    def known_values(self) -> int | None:
        """The number of values of an image, which the files say."""
        return None

    @property
    def files(self) -> tuple[str, str]:
        """Where the training and the test images lie."""
        return self.train, self.test


Channels = Annotated[
    Literal[1, 3] | None, Field(description="1 makes every image grey, 3 colour; as the first image when not set")
]


class ParquetSource(GivenSource):
    """Parquet in the hub's layout: ``train`` and ``test`` are each a file, a folder or a pattern (``data/train-*.parquet``)."""

    kind: Literal["parquet"] = "parquet"
    channels: Channels = None


class FolderSource(GivenSource):
    """Folders of images: ``train`` and ``test`` hold one folder for each class."""

    kind: Literal["folder"] = "folder"
    channels: Channels = None


class NpzSource(GivenSource):
    """``.npz`` files with the arrays ``image`` (uint8, images × height × width × channels) and ``label`` (integers)."""

    kind: Literal["npz"] = "npz"


OwnSource = ParquetSource | FolderSource | NpzSource
FileSource = Cifar10Source | Cifar100Source | Cifar2Source | OwnSource
SourceConfig = Annotated[DigitsSource | FileSource, Field(discriminator="kind")]
