"""Domains from their creation to their end: what xl does with one, on behalf of the command."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bus import sealed
from bus.abi import domctl as dc
from bus.abi import sched
from bus.abi.arch_x86 import XEN_X86_EMU_ALL, XEN_X86_EMU_LAPIC, XEN_X86_EMU_VPCI
from bus.abi.grant_table import GNTTAB_RESERVED_CONSOLE
from bus.abi.xen import DOMID_SELF, VIRQ_DOM_EXC
from bus.addresses import DomId, GrantRef, Mfn, Port, VcpuId
from bus.link import HypervisorGone
from bus.log import Logger
from bus.messages.control import DomainConfig
from bus.messages.domain import Order
from bus.packets import close_all
from domains.dom0.builder.errors import BuildError
from domains.dom0.builder.linuxboot import DirectBoot
from domains.dom0.consoled import Console, SerialLine
from domains.dom0.toolstack.disks import DiskError, Disks
from domains.dom0.toolstack.guest import Guest, ToolstackError, counters_of, state_of
from domains.dom0.toolstack.guest_nodes import write_guest_nodes, write_vnc_nodes
from domains.dom0.toolstack.hardware import Hardware, HardwareError
from domains.dom0.toolstack.hvm import build_hvm_domain
from domains.dom0.toolstack.images import ForeignMemory, build_pv_domain, read_file
from domains.dom0.toolstack.kernels import Files, load_direct, load_files
from domains.dom0.toolstack.models import DeviceModel, ModelError, model_settings, slot_of
from domains.dom0.toolstack.nics import NicError, Nics
from domains.dom0.toolstack.pvh import build_pvh_domain, slack_kib
from domains.dom0.xc import E820_RAM, ControlInterface
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import GrantError, HypercallError, NativeDomain

SHUTDOWN_NAMES: Final = {
    sched.SHUTDOWN_poweroff: "poweroff",
    sched.SHUTDOWN_reboot: "reboot",
    sched.SHUTDOWN_suspend: "suspend",
    sched.SHUTDOWN_crash: "crash",
    sched.SHUTDOWN_watchdog: "watchdog",
    sched.SHUTDOWN_soft_reset: "soft_reset",
}
EMULATION: Final = {"pv": 0, "pvh": XEN_X86_EMU_LAPIC, "hvm": XEN_X86_EMU_ALL & ~XEN_X86_EMU_VPCI}
"""emulation_flags of XEN_DOMCTL_createdomain, as libxl gives them."""
AGAIN_S: Final = 1.0
"""When the end of a domain that could not be dealt with is tried again."""
RESTART_LIMIT_S: Final = 1.0
"""A domain that reboots sooner than this after its start is not started again: it would go on for ever."""


Ended = Callable[[DomId, str, str, str], None]
"""(domid, name, reason, details)"""


class Manager:
    """All domains but Dom0."""

    def __init__(
        self, host: NativeDomain, store: XenstoreService, xc: ControlInterface, disks: Disks, consoles: Path
    ) -> None:
        self._host = host
        self.store = store
        self.xc = xc
        self.disks = disks
        self.hardware = Hardware(host, xc, disks)
        self.nics = Nics(host, store, xc, disks.deposit, Logger("dom0", part="nics").info)
        disks.find_domain = self.nics.find_domain = self._domain_called
        self._consoles = consoles
        self.guests: dict[DomId, Guest] = {}
        self.on_end: list[Ended] = []
        self.started = time.monotonic()
        self._again = False
        self._making: set[str] = set()
        """Names of domains that are being built: others are served meanwhile."""
        host.bind_virq(VIRQ_DOM_EXC, self.check)
        host.on_order["counters"] = self._counters

    # ------------------------------------------------------------------ creation

    def create(self, config: DomainConfig, descriptors: Sequence[int]) -> DomId:
        """Build a domain and start it (unless `paused`). The descriptors are taken over. ToolstackError."""
        files = dict(enumerate(descriptors))
        try:
            return self._create(config, files, None)
        except BaseException:
            close_all(list(files.values()))
            raise

    def _create(self, config: DomainConfig, files: dict[int, int], before: Guest | None) -> DomId:
        """`before`: the domain that rebooted, whose lines it takes over."""
        if config.name in self._making or any(
            guest.config.name == config.name and not guest.ending for guest in self.guests.values()
        ):
            raise ToolstackError(f"domain {config.name!r} exists already: choose another name, or destroy it")
        if config.pci and config.type == "pv":
            raise ToolstackError(
                f"{config.name}: pci: only PVH and HVM guests can be given a device: a PV guest has no PCI bus here"
            )
        images = load_direct(config, files) if config.type == "hvm" else load_files(config, files)
        try:
            translated = config.type != "pv"
            domid = self.xc.create_domain(
                uuid=config.uuid,
                max_vcpus=config.maxvcpus or config.vcpus,
                flags=dc.XEN_DOMCTL_CDF_hvm | (dc.XEN_DOMCTL_CDF_hap if config.hap else 0)
                if translated
                else 0,
                emulation_flags=EMULATION[config.type],
            )
        except HypercallError as error:
            raise ToolstackError(f"{config.name}: the hypervisor refused the domain: {error}") from None
        self._making.add(config.name)
        try:
            guest = self._build(domid, config, images, files, before)
        except (
            BuildError,
            HypercallError,
            GrantError,
            DiskError,
            NicError,
            HardwareError,
            ModelError,
            ValueError,
        ) as error:
            self._forget(domid)
            if isinstance(error, HypercallError) and error.errno == 12:
                raise ToolstackError(
                    f"{config.name}: not enough machine memory for {config.memory_mb} MB: give less, or the machine more"
                ) from None
            raise ToolstackError(f"{config.kernel_path or config.name}: {error}") from None
        except BaseException:
            self._forget(domid)
            raise
        finally:
            self._making.discard(config.name)
        self.guests[domid] = guest
        # Its process may have died while it was built: the event of that found nobody to look at.
        self._host.reactor.soon(lambda: self._carefully([lambda: self._look(guest)]))
        return domid

    def _build(
        self,
        domid: DomId,
        config: DomainConfig,
        images: Files | DirectBoot | None,
        files: dict[int, int],
        before: Guest | None,
    ) -> Guest:
        guest = self._guest(domid, config, files, before)
        try:
            self._model(guest, images.rom if isinstance(images, DirectBoot) else b"")
            self._fill(guest, images)
            if not config.paused:
                self.xc.unpause(domid)
        except BaseException:
            if guest.model is not None:
                guest.model.close()
            if before is None:
                guest.console.close()
                if guest.serial is not None:
                    guest.serial.close()
            raise
        return guest

    def _guest(
        self, domid: DomId, config: DomainConfig, files: dict[int, int], before: Guest | None
    ) -> Guest:
        """With its lines."""
        host = self._host
        if before is None:
            guest = Guest(
                domid, config, files, Console(host, domid, config.name, self._consoles), config.uuid
            )
            if config.type == "hvm":
                guest.serial = SerialLine(host.reactor, config.name, self._consoles)
        else:
            guest = Guest(domid, config, files, before.console, config.uuid, serial=before.serial)
            guest.console.domid = domid
        return guest

    def _model(self, guest: Guest, rom: bytes = b"") -> None:
        """The process of its device model, if it is to have one. `rom` starts its kernel, if it has one."""
        if guest.serial is None:
            return
        settings, given = model_settings(guest.config, guest.files)
        own = -1
        if rom:
            own = given["boot_rom"] = sealed.create("domicile-boot-rom", len(rom))
        try:
            if rom:
                os.pwrite(own, rom, 0)
            guest.model = DeviceModel(
                self._host.reactor, self.xc, self.disks.deposit, guest.domid, guest.serial, settings, given
            )
        finally:
            close_all([own] if own >= 0 else [])

    def _fill(self, guest: Guest, images: Files | DirectBoot | None) -> None:
        """Memory, first state, devices: all up to a domain that can be unpaused."""
        domid, config, files = guest.domid, guest.config, guest.files
        xc, host = self.xc, self._host
        vcpus = config.maxvcpus or config.vcpus
        xc.max_vcpus(domid, vcpus)
        extra = slack_kib(vcpus, pv=config.type == "pv")
        xc.max_mem(domid, (max(config.memory_mb, config.maxmem_mb) << 10) + extra)
        if config.time_offset:
            xc.set_time_offset(domid, config.time_offset)
        self.hardware.give(domid, config.pci)
        xenstore_port = host.alloc_unbound(domid, DOMID_SELF)
        console_port = host.alloc_unbound(domid, DOMID_SELF)
        ring: int
        if not isinstance(images, Files):
            ring = build_hvm_domain(
                host,
                xc,
                domid,
                self._firmware(config, files),
                config.memory_mb << 8,
                (vcpus, config.vcpus),
                config.uuid,
                config.serial,
                xenstore_port,
                console_port,
                images.pieces if images is not None else (),
                read_file(files[config.bios], "BIOS") if config.bios in files else b"",
            ).console_gfn
        elif config.type == "pvh":
            ring = build_pvh_domain(
                host,
                xc,
                domid,
                images.kernel,
                images.modules,
                images.cmdline,
                config.memory_mb << 8,
                (vcpus, config.vcpus),
                xenstore_port,
                console_port,
                pci=bool(config.pci),
            ).console_gfn
        else:
            ring = self._build_pv(domid, config, images, xenstore_port, console_port)
        xc.scheduler(domid, config.cpu_weight, config.cap)
        for vcpu, cpus in enumerate(config.cpus[:vcpus]):
            if cpus is not None:
                self.pin(domid, vcpu, set(cpus), None)
        guest.xenstore_port = xenstore_port
        guest.console.connect(host.map_grants(domid, [GrantRef(GNTTAB_RESERVED_CONSOLE)]), console_port)
        write_guest_nodes(self.store, guest, ring, console_port)
        self._attach_disks(guest)
        for vif in config.vifs:
            self.nics.attach(domid, vif, config.type)
        self.nics.wait_offered(domid)
        self.store.introduce(domid, xenstore_port)
        if guest.model is not None:
            guest.model.start()
            write_vnc_nodes(self.store, guest)

    def _attach_disks(self, guest: Guest) -> None:
        """An optical drive of a full HVM guest is its device model's alone; a disk is that first, and the back end's when the guest has
        unplugged it there."""
        slots: dict[str, str] = {}
        for disk in guest.config.disks:
            slot = slot_of(disk) if guest.model is not None else None
            if slot is not None and disk.get("cdrom"):
                continue
            file = guest.files.get(disk.get("file", -1))
            attached = self.disks.attach(guest.domid, disk, file, emulated=slot is not None)
            if slot is not None:
                slots[slot] = attached.vdev
        if guest.model is not None:

            def unplugged(names: list[str]) -> None:
                for vdev in [slots.pop(name) for name in names if name in slots]:
                    self.disks.hand_over(guest.domid, vdev)

            guest.model.on_unplugged = unplugged
        self.disks.wait_offered(guest.domid)

    def _firmware(self, config: DomainConfig, files: dict[int, int]) -> bytes:
        if config.firmware not in files:
            raise BuildError("no firmware was given")
        return read_file(files[config.firmware], config.firmware_path)

    def _build_pv(
        self,
        domid: DomId,
        config: DomainConfig,
        images: Files,
        xenstore_port: Port,
        console_port: Port,
    ) -> int:
        """Memory and first vCPU state of a PV domain. The console ring's frame."""
        xc, pages = self.xc, config.memory_mb << 8
        most = max(config.memory_mb, config.maxmem_mb) << 20
        xc.set_memory_map(domid, [(0, most, E820_RAM)])  # pseudophysical: as xl sets it
        mfns = xc.populate(domid, range(pages))
        if mfns[-1] - mfns[0] != pages - 1:
            raise ValueError("its memory is not contiguous")
        fd, extent = self._host.foreign_extents[domid]
        memory = ForeignMemory(fd, extent["base"], extent["frames"])
        try:
            built = build_pv_domain(
                memory,
                images.kernel,
                images.ramdisk,
                images.cmdline,
                range(mfns[0], mfns[0] + pages),
                Mfn(extent["shared_info"]),
                xenstore_port,
                console_port,
                xc.grant_table_frame(domid),
                DomId(0),
            )
        finally:
            memory.close()
        xc.set_vcpu_context(domid, VcpuId(0), built.context)
        return built.console_mfn

    # ------------------------------------------------------------------ the end of a domain

    def _counters(self, order: Order, fds: list[int]) -> bytes:
        guest = self.guests.get(DomId(order.body["domid"]))
        if guest is not None:
            guest.counters = counters_of(order.body["counters"])
        return b""

    def check(self) -> None:
        """VIRQ_DOM_EXC: look which domains have shut down or died. What goes wrong with one is logged and tried again: it is no
        matter of the others."""
        checks = [self.disks.check, self.nics.check]
        checks += [lambda guest=guest: self._look(guest) for guest in self.guests.values()]  # type: ignore[misc]  # the default binds now
        self._carefully(checks)

    def _carefully(self, checks: Sequence[Callable[[], None]]) -> None:
        for check in checks:
            try:
                check()
            except HypervisorGone:
                raise
            except Exception as error:
                print("".join(traceback.format_exception(error))[-4000:], flush=True)
                if not self._again:
                    self._again = True
                    self._host.reactor.after(AGAIN_S, self._check_again)

    def _check_again(self) -> None:
        self._again = False
        self.check()

    def _look(self, guest: Guest) -> None:
        if self.guests.get(guest.domid) is not guest:
            return
        if guest.unfinished is not None:
            self._end(guest, *guest.unfinished)
            return
        info = self.xc.domain_info(guest.domid)
        if guest.ending:
            return
        if info is None:
            self._end(guest, "destroyed", "")
        elif info.flags & dc.XEN_DOMINF_shutdown:
            code = info.flags >> dc.XEN_DOMINF_shutdownshift & dc.XEN_DOMINF_shutdownmask
            self._shut_down(guest, SHUTDOWN_NAMES.get(code, f"code {code}"))

    def _shut_down(self, guest: Guest, reason: str) -> None:
        config = guest.config
        action = {
            "poweroff": config.on_poweroff,
            "reboot": config.on_reboot,
            "crash": config.on_crash,
            "watchdog": config.on_watchdog,
            "soft_reset": config.on_soft_reset,
        }.get(reason, "destroy")
        details = self.crash_details(guest.domid) if reason in ("crash", "watchdog") else ""
        self.store.domain_shutdown(guest.domid)
        if action == "preserve":
            guest.ending = True
            self._tell(guest, reason, details)
        elif action in ("restart", "rename-restart", "coredump-restart"):
            self._restart(guest, reason, details)
        elif action == "soft-reset":  # its memory would have to be kept: XEN_DOMCTL_soft_reset is not built
            self._end(
                guest, reason, "soft-reset is not built: on_soft_reset='restart' starts the domain anew"
            )
        else:
            self._end(guest, reason, details)

    def _restart(self, guest: Guest, reason: str, details: str) -> None:
        if time.monotonic() - guest.started < RESTART_LIMIT_S:
            self._end(
                guest,
                reason,
                f"{details}\nnot restarted: it ran for less than {RESTART_LIMIT_S:.0f} s".strip(),
            )
            return
        guest.ending = True
        guest.unfinished = (reason, details)
        if (
            guest.model is not None
        ):  # its last serial output; others are served meanwhile, and do not see to this end too
            guest.finishing = True
            try:
                guest.model.drain()
            finally:
                guest.finishing = False
        guest.disconnect()
        self._forget(guest.domid, guest.model)
        del self.guests[guest.domid]
        try:
            domid = self._create(guest.config, guest.files, guest)
        except ToolstackError as error:
            guest.close()
            self._tell(guest, reason, f"restart failed: {error}")
            return
        for notify in list(self.on_end):
            notify(guest.domid, guest.config.name, "restarted", str(domid))

    def _end(self, guest: Guest, reason: str, details: str) -> None:
        """Once: its device model is waited for, and others are served meanwhile, who may look at this guest or destroy it."""
        if guest.finishing:
            return
        guest.ending = guest.finishing = True
        guest.unfinished = (reason, details)
        try:
            if guest.model is not None:
                guest.model.drain()
            guest.disconnect()
            self._forget(guest.domid, guest.model)
            self._tell(guest, reason, details)
            guest.close()
            self.guests.pop(guest.domid, None)
        finally:
            guest.finishing = False

    def _tell(self, guest: Guest, reason: str, details: str) -> None:
        for notify in list(self.on_end):
            notify(guest.domid, guest.config.name, reason, details)

    def _forget(self, domid: DomId, model: DeviceModel | None = None) -> None:
        """Destroy a domain with its device model, and what the store knows of it."""
        base = f"/local/domain/{domid}"
        vm = self.store.read(f"{base}/vm")
        with (
            contextlib.ExitStack() as steps
        ):  # last first, all of them, whichever fails; the error comes after
            if vm:
                steps.callback(self.store.remove, vm)
            steps.callback(self.store.remove, base)
            if model is not None:
                steps.callback(model.close)
            steps.callback(self._destroy, domid)
            steps.callback(self.store.domain_died, domid)
            steps.callback(self.nics.domain_died, domid)
            steps.callback(self.disks.domain_died, domid)

    def _destroy(self, domid: DomId) -> None:
        try:
            self.xc.destroy(domid)
        except HypercallError as error:
            if error.errno != 3:  # ESRCH: gone already
                raise

    def crash_details(self, domid: DomId) -> str:
        """What the hypervisor's log has of a domain's crash."""
        lines = self.xc.read_console().decode("utf-8", "replace").splitlines()
        mine = [line for line in lines if f"(d{domid})" in line or f"domain {domid} " in line]
        return "\n".join(mine[-60:])

    # ------------------------------------------------------------------ the command's verbs

    def _domain_called(self, name: str) -> DomId | None:
        if name in ("0", "Domain-0"):
            return DomId(0)
        for guest in self.guests.values():
            if name in (str(guest.domid), guest.config.name) and not guest.ending:
                return guest.domid
        return None

    def find(self, name: str | int) -> Guest:
        """By domid or name. ToolstackError if there is none."""
        for guest in self.guests.values():
            if str(guest.domid) == str(name) or guest.config.name == name:
                return guest
        raise ToolstackError(f"domain {name!r} does not exist: `domicile list` shows those that do")

    def name_of(self, domid: int) -> str:
        """A domain's name."""
        if domid == 0:
            return "Domain-0"
        for driver in (self.disks.driver, self.nics.driver):
            if domid == driver.domid:
                return driver.name
        for guest in self.guests.values():
            if guest.model is not None and guest.model.domid == domid:
                return f"{guest.config.name}-dm"
        found = self.guests.get(DomId(domid))
        return found.config.name if found is not None else "(null)"

    def list_domains(self) -> list[dict[str, Any]]:
        """What `xl list` shows."""
        rows = []
        for info in self.xc.domain_list():
            guest = self.guests.get(DomId(info.domain))
            config = guest.config.model_dump() if guest is not None else {}
            for hidden in ("uuid", "vnc_password"):
                config.pop(hidden, None)
            rows.append(
                {
                    "domid": info.domain,
                    "name": self.name_of(info.domain),
                    "mem_mb": info.tot_pages >> 8,
                    "max_mb": info.max_pages >> 8,
                    "vcpus": info.nr_online_vcpus,
                    "state": state_of(info),
                    "time_s": info.cpu_time / 1e9,
                    "uuid": info.handle.hex(),
                    "config": config,
                }
            )
        return rows

    def pin(self, domid: DomId, vcpu: int, hard: set[int] | None, soft: set[int] | None) -> None:
        """Set the physical CPUs of a vCPU (hard: it runs on no others). ToolstackError."""
        machine = self.xc.physinfo().nr_cpus
        for cpus in (hard, soft):
            if cpus is not None and not any(cpu < machine for cpu in cpus):
                raise ToolstackError(
                    f"vCPU {vcpu} of {self.name_of(domid)}: the machine has CPUs 0 to {machine - 1}, none of them is in"
                    f" {min(cpus)} to {max(cpus)}"
                )
        try:
            self.xc.affinity(domid, vcpu, hard, soft)
        except HypercallError as error:
            raise ToolstackError(f"{self.name_of(domid)} has no vCPU {vcpu} ({error})") from None

    def shutdown(self, name: str | int, how: str, *, fallback: bool = False) -> None:
        """Ask a guest to power off or reboot, through xenstore (control/shutdown). `fallback`: a full HVM guest without PV drivers has
        its power button pressed, or is reset."""
        guest = self.find(name)
        if fallback and guest.model is not None and not self._has_drivers(guest.domid):
            if how == "poweroff":
                self.xc.trigger(guest.domid, dc.XEN_DOMCTL_SENDTRIGGER_POWER, 0)
            else:
                self.xc.remote_shutdown(guest.domid, sched.SHUTDOWN_reboot)
            return
        self.store.write(f"/local/domain/{guest.domid}/control/shutdown", how)

    def _has_drivers(self, domid: DomId) -> bool:
        """The guest watches control/shutdown: it says so (Linux writes control/feature-poweroff when its driver is up)."""
        return self.store.read(f"/local/domain/{domid}/control/feature-poweroff") == "1"

    def destroy(self, name: str | int) -> None:
        """End a domain at once."""
        guest = self.find(name)
        self._end(guest, "destroyed", "")

    def pause(self, name: str | int) -> None:
        """Stop its vCPUs."""
        self.xc.pause(self.find(name).domid)

    def unpause(self, name: str | int) -> None:
        """Let them run again."""
        try:
            self.xc.unpause(self.find(name).domid)
        except HypercallError as error:
            raise ToolstackError(f"domain {name}: not paused ({error})") from None

    def close(self) -> None:
        """End every domain."""
        for guest in list(self.guests.values()):
            self._end(guest, "destroyed", "")
