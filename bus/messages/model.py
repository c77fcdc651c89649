"""The link between Dom0's toolstack and a device model, beside the hypervisor: what a person does with a PC from outside.

The device model's descriptors (this link, disk images) are deposited with the warden before its domain is created. Dom0 believes
nothing that comes from a device model but that it is about this one guest.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from bus.messages.domain import U32
from bus.messages.envelope import MAX_DATA, Message, registry

Bytes = Annotated[bytes, Field(max_length=MAX_DATA // 2)]
SlotName = Annotated[str, Field(max_length=16, pattern=r"^[a-z0-9]+$")]


class ModelGo(Message):
    """The guest is built, and the device model has rights over it: make the ioreq server."""

    KIND: ClassVar[str] = "model_go"
    guest: U32


class ModelInput(Message):
    """Bytes for the guest's serial line."""

    KIND: ClassVar[str] = "model_input"
    data: Bytes


class ModelKeys(Message):
    """Keys pressed and released, in this order: names as QEMU's `sendkey` has them, joined by '-' (ctrl-alt-delete)."""

    KIND: ClassVar[str] = "model_keys"
    token: U32
    keys: Annotated[
        list[Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9_-]+$")]], Field(max_length=1024)
    ]


class ModelScreen(Message):
    """Take a picture of the screen."""

    KIND: ClassVar[str] = "model_screen"
    token: U32


class ModelFlush(Message):
    """The guest does not run any more: say what it wrote last, then that this is done."""

    KIND: ClassVar[str] = "model_flush"
    token: U32


class ModelReady(Message):
    """Its ranges are in effect: the guest may run. Where its VNC server listens; port 0: it has none."""

    KIND: ClassVar[str] = "model_ready"
    vnc_listen: Annotated[str, Field(max_length=64, pattern=r"^[0-9a-fA-F.:]*$")] = ""
    vnc_port: Annotated[int, Field(ge=0, le=65535)] = 0


class ModelOutput(Message):
    """Bytes that the guest sent on its serial line."""

    KIND: ClassVar[str] = "model_output"
    data: Bytes


class ModelUnplugged(Message):
    """The guest unplugged these emulated disks (by the slot's name); their images are closed here."""

    KIND: ClassVar[str] = "model_unplugged"
    slots: Annotated[list[SlotName], Field(max_length=8)]


class ModelPicture(Message):
    """The screen, three bytes (red, green, blue) a pixel, in a sealed memfd that comes along; or why there is none."""

    KIND: ClassVar[str] = "model_picture"
    token: U32
    width: Annotated[int, Field(ge=0, le=4096)]
    height: Annotated[int, Field(ge=0, le=4096)]
    error: Annotated[str, Field(max_length=200)] = ""


class ModelDone(Message):
    """A request with that token is done, or why not."""

    KIND: ClassVar[str] = "model_done"
    token: U32
    error: Annotated[str, Field(max_length=200)] = ""


class ModelFailed(Message):
    """It cannot serve its guest."""

    KIND: ClassVar[str] = "model_failed"
    why: Annotated[str, Field(max_length=400)]


TO_MODEL = registry(ModelGo, ModelInput, ModelKeys, ModelScreen, ModelFlush)
FROM_MODEL = registry(ModelReady, ModelOutput, ModelUnplugged, ModelPicture, ModelDone, ModelFailed)
