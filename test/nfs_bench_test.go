package test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"krgimage/initramfs"
	"krgimage/node/trial"
)

// BenchmarkNFS measures the file server against go-nfs and nfs-ganesha with the
// same client over loopback, and prints a line for each load; see test/nfsload.
// nfs-ganesha is left out where it is not installed.
func BenchmarkNFS(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: namespaces, and the file server's privileges")
	}
	program := buildLoad(b)
	for range b.N {
		// On the disk of the machine, not in a tmpfs.
		dir, err := os.MkdirTemp("/var/tmp", "nfsload-")
		if err != nil {
			b.Fatal(err)
		}
		defer os.RemoveAll(dir)
		ctx, cancel := context.WithTimeout(b.Context(), 20*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, "compare", dir)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkNFSKernel measures the file server against the kernel's, both in one
// QEMU guest with the cluster's kernel, over its loopback, on one ext4 disk.
func BenchmarkNFSKernel(b *testing.B) {
	s := newSite(b)
	s.run(time.Minute, "init")
	s.run(20*time.Minute, "build")
	modules, err := filepath.Glob(s.path("state/parts/kernel/*/tree/root/usr/lib/modules/*"))
	if err != nil || len(modules) != 1 {
		b.Fatalf("modules of the kernel: %v, %v", modules, err)
	}
	for range b.N {
		kernelGuest(b, s.path("state/image/current/vmlinuz"), modules[0])
	}
}

// kernelGuest boots nfsload as the init of a guest and prints its table.
func kernelGuest(b *testing.B, kernel, modules string) {
	b.Helper()
	program, err := os.ReadFile(buildLoad(b))
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	archive, disk := filepath.Join(dir, "initrd"), filepath.Join(dir, "disk")
	f, err := os.Create(archive)
	if err != nil {
		b.Fatal(err)
	}
	err = initramfs.Init(f, program)
	if err == nil {
		_, err = initramfs.Modules(f, initramfs.Source{Modules: modules}, []string{"virtio_blk", "crc32c_generic", "ext4", "nfsd"})
	}
	if err := errors.Join(err, f.Close()); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", disk, "2G").CombinedOutput(); err != nil {
		b.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(b.Context(), 30*time.Minute)
	defer cancel()
	install, err := trial.Find(false)
	if err != nil {
		b.Fatal(err)
	}
	accel, err := trial.Probe(ctx, install.QEMU)
	if err != nil {
		b.Fatal(err)
	}
	args := append([]string{"-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-no-reboot",
		"-m", "2048", "-smp", "2", "-serial", "stdio", "-kernel", kernel, "-initrd", archive,
		"-drive", "file=" + disk + ",format=raw,if=virtio",
		"-append", "console=ttyS0,115200 quiet panic=-1 nfsload=" + os.Getenv("NFSLOAD_ONLY")}, accel.Args...)
	cmd := exec.CommandContext(ctx, install.QEMU, args...)
	var console bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(os.Stdout, &console), os.Stderr
	if err := cmd.Run(); err != nil {
		b.Fatalf("guest: %v", err)
	}
	if !strings.Contains(console.String(), "nfsload: guest done") {
		b.Fatal("the guest did not come to its end")
	}
}

// buildLoad compiles test/nfsload, statically, for a guest too.
func buildLoad(b *testing.B) string {
	b.Helper()
	program := filepath.Join(b.TempDir(), "nfsload")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "./nfsload")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build nfsload: %v\n%s", err, out)
	}
	return program
}
