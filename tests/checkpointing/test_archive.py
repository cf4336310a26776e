"""The file is what ``torch.save`` would have written: stock torch reads it, and finds the same in it (C6)."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from lightning_efficient.checkpointing.archive import Archive, StorageLayout
from lightning_efficient.checkpointing.skeleton import take_skeleton
from tests.checkpointing.states import checkpoint_of, layout_of, same, trained, write

BASE = torch.arange(24.0)
PLAIN: dict[str, Any] = {
    "tensor": BASE,
    "view": BASE[2:8:2],
    "transposed": BASE.view(4, 6).t(),
    "parameter": nn.Parameter(torch.ones(3)),
    "wants grad": torch.ones(2, requires_grad=True),
    "empty": torch.empty(0),
    "empty too": torch.empty(0, 3),
    "scalar": torch.tensor(1.5),
    "bool": torch.tensor([True, False]),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
    "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    "u16": torch.ones(3, dtype=torch.uint16),
    "complex": torch.ones(2, dtype=torch.complex64),
    "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    "negated": torch.randn(4, dtype=torch.complex64).conj().imag,
    "set": {1, 2},
    "nested": [("a", {"b": None}), OrderedDict(x=1)],
    "large number": 2**70,
}


def round_trip(state: Any, **how: Any) -> Any:
    with io.BytesIO() as stream:
        torch.save(state, stream)
        stream.seek(0)
        return torch.load(stream, **how)


def test_stock_torch_reads_what_it_would_have_written_c6(tmp_path: Path) -> None:
    path = write(PLAIN, tmp_path / "state.ckpt")
    loaded = torch.load(path, weights_only=True)
    assert same(loaded, round_trip(PLAIN, weights_only=True))
    storages = {loaded[name].untyped_storage().data_ptr() for name in ("tensor", "view", "transposed")}
    assert len(storages) == 1, "views of one storage stay views of one storage"
    assert same(torch.load(path, weights_only=True, mmap=True), loaded)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # what torch.load makes of a storage
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # and torch 2.11's of what is sparse
def test_objects_that_are_no_plain_tensors_c6(tmp_path: Path) -> None:
    state = {
        "numpy": numpy.arange(5),
        "sparse": torch.eye(3).to_sparse(),
        "storage": torch.ones(3).untyped_storage(),
        "meta": torch.empty(3, device="meta"),
        "random": random.Random(1),
    }
    loaded = torch.load(write(state, tmp_path / "state.ckpt"), weights_only=False)
    assert loaded["numpy"].tolist() == state["numpy"].tolist()
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))
    assert loaded["storage"].tolist() == state["storage"].tolist()
    assert loaded["meta"].device.type == "meta"
    assert loaded["random"].random() == random.Random(1).random()


def test_state_dicts_keep_ties_and_metadata_c6(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = checkpoint_of(model, optimizer)
    loaded = torch.load(write(state, tmp_path / "state.ckpt"), weights_only=True)
    assert same(loaded, round_trip(state, weights_only=True))
    assert loaded["state_dict"]._metadata == model.state_dict()._metadata
    weights = loaded["state_dict"]
    assert weights["a.weight"].untyped_storage().data_ptr() == weights["b.weight"].untyped_storage().data_ptr()


def test_the_short_cut_pickles_what_torch_pickles(tmp_path: Path) -> None:
    """Operation by operation; where a storage comes twice we repeat less."""
    model, optimizer = trained()
    model.b.weight = nn.Parameter(model.b.weight.detach().clone())
    state = checkpoint_of(model, optimizer)
    ours = take_skeleton(state).pickled
    with io.BytesIO() as stream:
        torch.save(state, stream)
        with zipfile.ZipFile(stream) as archive:
            theirs = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    operations = [list(_operations(pickled)) for pickled in (ours, theirs)]
    assert operations[0] == operations[1]


def _operations(pickled: bytes) -> Any:
    """What a pickle does, without memo indices, which depend on how objects were made."""
    import pickletools

    for operation, argument, _ in pickletools.genops(pickled):
        if "PUT" not in operation.name and "GET" not in operation.name and operation.name != "MEMOIZE":
            yield operation.name, argument


def test_every_record_has_its_checksum_and_place(tmp_path: Path) -> None:
    path = write(PLAIN, tmp_path / "state.ckpt")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
        names = [member.filename for member in archive.infolist()]
    assert len(names) == len(set(names))


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    one, other = (write(PLAIN, tmp_path / name).read_bytes() for name in ("a.ckpt", "b.ckpt"))
    assert one == other


def test_memory_seen_as_two_types_is_refused_as_torch_does() -> None:
    base = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"view the same memory as torch.float32 and as torch.int32"):
        take_skeleton([base, base.view(torch.int32)])


def test_what_cannot_be_pickled_says_so() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        take_skeleton({"function": lambda: None})


def test_files_past_four_gigabytes(tmp_path: Path) -> None:
    """Headers only: the storages are holes in the file."""
    large = (1 << 32) + 7
    layout = StorageLayout([(0, 100), (1, large), (2, 3)])
    archive = Archive(layout, b"pickled", b"{}")
    path = tmp_path / "large.ckpt"
    with path.open("wb") as file:
        for record in layout.records.values():
            file.seek(record.header)
            file.write(archive.header(record, 0))
            assert file.tell() == record.start
        for record, content in archive.small:
            file.seek(record.header)
            file.write(archive.header(record, 1) + content)
        file.seek(archive.directory)
        every = [*layout.records.values(), *(record for record, _ in archive.small)]
        file.write(archive.tail({record.name: 0 for record in every}, 0))
        assert file.tell() == archive.nbytes
    with zipfile.ZipFile(path) as read:
        sizes = {member.filename: (member.file_size, member.header_offset) for member in read.infolist()}
    assert sizes["archive/data/1"] == (large, layout.records[1].header)
    assert sizes["archive/data/2"] == (3, layout.records[2].header)
    reader = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record_offset("data/2") == layout.records[2].start


def test_many_records(tmp_path: Path) -> None:
    """More than the 65,535 that the first ZIP format can count."""
    state = [torch.tensor([float(i)]) for i in range(65_600)]
    path = write(state, tmp_path / "many.ckpt")
    loaded = torch.load(path, weights_only=True)
    assert loaded[65_599].item() == 65_599
    assert zipfile.ZipFile(path).testzip() is None


def test_the_layout_does_not_depend_on_the_rest() -> None:
    model, optimizer = trained()
    one = layout_of(take_skeleton(checkpoint_of(model, optimizer)))
    other = layout_of(take_skeleton({**checkpoint_of(model, optimizer), "more": "text" * 1000}))
    assert one.records == other.records


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_go_the_long_way_c6(tmp_path: Path) -> None:
    parts = [torch.randn(2, 3), torch.randn(1, 3)]
    path = write({"ragged": torch.nested.nested_tensor(parts), "plain": torch.ones(2)}, tmp_path / "a.ckpt")
    loaded = torch.load(path, weights_only=False)
    assert all(torch.equal(one, other) for one, other in zip(loaded["ragged"].unbind(), parts, strict=True))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_what_is_pickled_later_is_what_was_there_at_the_save_c6() -> None:
    """Containers, numbers, arrays and where tensors lie; only the tensors' bytes are left to the copies."""
    weight, array, numbers = torch.arange(6.0).view(2, 3), numpy.arange(3), [1, {"a": 2}]
    state: dict[str, Any] = {"w": weight, "same": weight, "array": array, "numbers": numbers, "od": OrderedDict(x=1)}
    state["od"]._metadata = {"version": 1}
    expected = pickle.loads(pickle.dumps({key: value for key, value in state.items() if key not in ("w", "same")}))
    skeleton = take_skeleton(state)
    numbers[1]["a"] = 9
    numbers.append(3)
    array[0] = 7
    weight.t_()
    state["od"]._metadata["version"] = 2
    state.clear()

    class Reader(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return torch.storage.TypedStorage(wrap_storage=skeleton.storages[int(pid[2])], dtype=torch.float32)

    loaded = Reader(io.BytesIO(skeleton.pickled)).load()
    assert loaded["w"] is loaded["same"]
    assert loaded["w"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert loaded["od"]._metadata == {"version": 1}
    assert loaded["array"].tolist() == expected["array"].tolist() == [0, 1, 2]
    assert loaded["numbers"] == expected["numbers"] == [1, {"a": 2}]
