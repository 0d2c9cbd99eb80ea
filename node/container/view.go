package container

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// enter builds the container's view of the file systems over c.Root and makes
// it the root of this process. It runs in the new namespaces, where no mount
// of it can be seen by the host.
func enter(c Config) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, step := range []func(Config) error{mountDev, mountProc, mountSys, mountRun, pivot} {
		if err := step(c); err != nil {
			return fmt.Errorf("container: %w", err)
		}
	}
	return nil
}

func mount(source, dir, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, dir, fstype, flags, data); err != nil {
		if fstype == "" {
			fstype = "bind " + source
		}
		return fmt.Errorf("mount %s on %s: %w", fstype, dir, err)
	}
	return nil
}

// devices of a minimal /dev.
var devices = []struct {
	name         string
	mode         uint32
	major, minor uint32
}{
	{"null", 0o666, 1, 3},
	{"zero", 0o666, 1, 5},
	{"full", 0o666, 1, 7},
	{"random", 0o666, 1, 8},
	{"urandom", 0o666, 1, 9},
	{"tty", 0o666, 5, 0},
	{"console", 0o600, 5, 1},
}

// groupTTY is Debian's group tty, which owns terminals so that mesg(1) works.
const groupTTY = 5

func mountDev(c Config) error {
	dev := filepath.Join(c.Root, "dev")
	if err := mount("tmpfs", dev, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755,size=1m"); err != nil {
		return err
	}
	for _, d := range devices {
		path := filepath.Join(dev, d.name)
		if err := unix.Mknod(path, unix.S_IFCHR|d.mode, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("make /dev/%s: %w", d.name, err)
		}
		if err := os.Chmod(path, os.FileMode(d.mode)); err != nil { // mknod's mode is subject to the umask
			return err
		}
	}
	if err := os.Lchown(filepath.Join(dev, "tty"), 0, groupTTY); err != nil {
		return err
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
		"ptmx": "pts/ptmx", "core": "/proc/kcore",
	} {
		if err := os.Symlink(target, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	for _, m := range []struct{ name, fstype, data string }{
		{"pts", "devpts", fmt.Sprintf("newinstance,ptmxmode=0666,mode=0620,gid=%d", groupTTY)},
		{"shm", "tmpfs", "mode=1777"},
		{"mqueue", "mqueue", ""},
	} {
		dir := filepath.Join(dev, m.name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		flags := uintptr(unix.MS_NOSUID | unix.MS_NOEXEC)
		if m.fstype != "devpts" {
			flags |= unix.MS_NODEV
		}
		if err := mount(m.fstype, dir, m.fstype, flags, m.data); err != nil && m.fstype != "mqueue" {
			return err
		}
	}
	return nil
}

func mountProc(c Config) error {
	return mount("proc", filepath.Join(c.Root, "proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

// mountSys gives a read-only view of the node's devices, with control groups
// writable.
func mountSys(c Config) error {
	sys := filepath.Join(c.Root, "sys")
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := mount("sysfs", sys, "sysfs", flags|unix.MS_RDONLY, ""); err != nil {
		return err
	}
	err := mount("cgroup2", filepath.Join(sys, "fs/cgroup"), "cgroup2", flags, "")
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
		return nil // a kernel that has control groups of the first kind or none
	}
	return err
}

func mountRun(c Config) error {
	run := filepath.Join(c.Root, "run")
	if err := mount("tmpfs", run, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=20%"); err != nil {
		return err
	}
	for name, mode := range map[string]os.FileMode{"lock": 0o777 | os.ModeSticky, "sshd": 0o755, "krg": 0o755} {
		dir := filepath.Join(run, name)
		if err := errors.Join(os.Mkdir(dir, 0o755), os.Chmod(dir, mode)); err != nil {
			return err
		}
	}
	if c.Shared == "" {
		return nil
	}
	return mount(c.Shared, filepath.Join(run, "krg"), "", unix.MS_BIND, "")
}

// pivot makes c.Root the root and lets go of the old one. Both are stacked on
// one directory for a moment, so no directory in the shared tree is needed.
func pivot(c Config) error {
	if err := unix.Chdir(c.Root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root to %s: %w", c.Root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the host's root: %w", err)
	}
	return unix.Chdir("/")
}

// mountShares mounts what the cluster has besides the shared root, and tries for
// ever: without it programs would write below. It comes last, when links in the
// shared tree can't lead out of it any more.
func mountShares(c Config, log *slog.Logger) error {
	for _, share := range c.Shares {
		if err := share.NFS.Mount(context.Background(), log, share.At); err != nil {
			return err
		}
	}
	return nil
}
