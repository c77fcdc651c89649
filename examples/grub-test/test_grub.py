"""Debian's GRUB for Xen, which nobody here wrote, is tested: it boots, computes, reads a file of its disk, and halts."""

from toolstack.guestfetch import fetch


def test_grub_reads_its_disk_and_halts(domain, disk):
    image = disk(16, files={"hello.txt": b"Hello, GRUB\n"})
    grub = domain(fetch("grub").kernel, disks=[image])
    grub.console.expect(r"grub> ")
    grub.console.sendline("expr=$grub_cpu; echo cpu is $expr")
    grub.console.expect(r"cpu is x86_64")
    grub.console.sendline("cat (xen/xvda)/hello.txt")
    grub.console.expect("Hello, GRUB\n")
    grub.console.sendline("halt")
    assert grub.wait_end() == "poweroff"
