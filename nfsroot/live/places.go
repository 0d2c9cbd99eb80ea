package live

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/meta"
)

// checkServer finds out whether the directory, which may be on another server,
// takes files as a root needs them, and whether it lacks extended attributes.
// NFS version 3, by which nodes see the root, has none anyway.
func checkServer(dir string) (loose bool, err error) {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("nfsroot.mounted: there is no directory %s on this machine\n  fix: mount the server's directory there, or leave the setting out and use 'krgimage export rootfs'", dir)
	case err != nil:
		return false, fmt.Errorf("nfsroot.mounted: %w", err)
	case !info.IsDir():
		return false, fmt.Errorf("nfsroot.mounted: %s is not a directory", dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("nfsroot.mounted: %s: %w", dir, err)
	}
	loose = st.Type == unix.NFS_SUPER_MAGIC
	probe, err := os.CreateTemp(dir, ".krgimage-probe-")
	if err != nil {
		return false, fmt.Errorf("nfsroot.mounted: %w\n  fix: let this machine write to the directory, as root", err)
	}
	defer os.Remove(probe.Name())
	defer probe.Close()
	// Any uid will do that is neither root's nor nobody's.
	const other = 12345
	info, err = probe.Stat()
	if err == nil && info.Sys().(*syscall.Stat_t).Uid == 0 {
		if err = probe.Chown(other, other); err == nil {
			info, err = os.Stat(probe.Name())
		}
	}
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return false, fmt.Errorf("nfsroot.mounted: %s: %w", dir, err)
	}
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != other {
		return false, fmt.Errorf("nfsroot.mounted: in %s root of this machine is not root: files can't get their owners\n  fix: export it with no_root_squash (Ganesha: Squash = No_Root_Squash) to this machine and to the nodes", dir)
	}
	return loose, nil
}

// makePlaces makes the directories on which nodes mount others.
func makePlaces(root meta.Root, places []Place) error {
	for _, p := range places {
		if info, err := os.Stat(p.Dir); err != nil || !info.IsDir() {
			return fmt.Errorf("nfsroot.exports: there is no directory %s on this machine\n  fix: make it, or mount what belongs there", p.Dir)
		}
		at := strings.TrimPrefix(p.At, "/")
		if err := root.MkdirAll(at, 0o755); err != nil {
			return fmt.Errorf("nfsroot.exports: %s in the root: %w", p.At, err)
		}
		if info, err := root.Stat(at); err != nil || !info.IsDir() {
			return fmt.Errorf("nfsroot.exports: %s in the root is not a directory", p.At)
		}
	}
	return nil
}

// homes is what nodes see as /home.
func (s *syncer) homes(root meta.Root) (meta.Root, error) {
	for _, p := range s.in.Places {
		if p.At == "/home" {
			return meta.Open(filepath.Clean(p.Dir), s.kept)
		}
	}
	return root.OpenRoot("home")
}
