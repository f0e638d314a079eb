"""Labels outside the vocabulary on CUDA: the kernels do not read them, and note them in a tensor that is read later."""

import torch

_NOTES: dict[torch.device, torch.Tensor] = {}  # int64 [4]: how many such labels, and row, id and V of one of them


def note(device: torch.device) -> torch.Tensor | None:
    """The tensor in which kernels on this device note such labels; None where they are refused at once or not noted."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    if device not in _NOTES:
        if torch.cuda.is_current_stream_capturing():  # the tensor would belong to the CUDA graph
            return None
        _NOTES[device] = torch.zeros(4, dtype=torch.int64, device=device)
    return _NOTES[device]


def note_labels(noted: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, vocabulary: int) -> None:
    """Notes the labels outside [0, vocabulary) on rows that count, as the kernels do, without waiting for the device."""
    outside = ((labels < 0) | (labels >= vocabulary)).flatten()
    if mask is not None:
        outside &= mask.flatten()
    if outside.numel() == 0:
        return
    row = outside.int().argmax()
    found = torch.stack([row, labels.flatten()[row], torch.full_like(row, vocabulary)])
    noted[1:] = torch.where((noted[0] == 0) & outside.any(), found, noted[1:])
    noted[0] += outside.sum()


def check_labels(device: torch.device | str | None = None) -> None:
    """Raise an error if an op met a label outside the vocabulary on a CUDA device since the last call.

    On CUDA an op does not raise that error itself: the host would have to wait for the device. Instead the result of
    the row is NaN, its gradient is 0, and the label is noted. Call this where the host waits for the device anyway, for
    example after the statistics of a training step were read.

    Args:
        device: the device to ask; None asks all on which an op has run.

    Raises:
        ValueError: there was such a label. The text names a row, its id and V, and how many there were. The count
            starts again at 0.

    Notes:
        Waits for the device. Calls under torch.compile are not noted; with `validate=True` an op checks its labels at
        once.
    """
    for noted in [_NOTES[key] for key in _NOTES if device is None or key == torch.device(device)]:
        count, row, label, vocabulary = noted.tolist()
        if count:
            noted.zero_()
            raise ValueError(
                f"logprobs: labels must be ids in [0, {vocabulary}), got {label} in row {row} of an earlier "
                f"call on {noted.device}; {count} in all since the last check"
            )
