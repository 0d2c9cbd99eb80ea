package stage1

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"krgimage/node/rescue"
	"krgimage/node/settings"
)

// Paths in the shared root.
const (
	imageFile = "etc/krgimage/image.json"
	krgFile   = "usr/sbin/krg"
)

// checkRoot looks whether dir is the root of an image that this node can run
// and copies its krg to binary, which must be in memory. The copy is what was
// checked and what will run, so neither a change of the file nor a dead file
// server can hurt PID 1 later.
func checkRoot(dir, binary string) (settings.Image, error) {
	var image settings.Image
	text, err := os.ReadFile(filepath.Join(dir, imageFile))
	if errors.Is(err, fs.ErrNotExist) {
		return image, rescue.Hint(fmt.Errorf("the root has no /%s: it was not made by krgimage build", imageFile),
			"check nfsroot= on the kernel command line and what the NFS server exports")
	}
	if err != nil {
		return image, fmt.Errorf("check the root: %w", err)
	}
	if err := json.Unmarshal(text, &image); err != nil {
		return image, rescue.Hint(fmt.Errorf("the root's /%s is damaged: %w", imageFile, err), "run 'krgimage build' and start serving again")
	}
	return image, copyBinary(filepath.Join(dir, krgFile), binary, image.KrgSHA256)
}

func copyBinary(from, to, wantSHA256 string) error {
	// Nothing in a root that users may write is followed or waited for.
	in, err := os.OpenFile(from, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return rescue.Hint(fmt.Errorf("the root has no usable /%s: %w", krgFile, err), "run 'krgimage build' and start serving again")
	}
	defer in.Close()
	if fi, err := in.Stat(); err != nil || !fi.Mode().IsRegular() {
		return rescue.Hint(fmt.Errorf("the root's /%s is not a regular file", krgFile), "run 'krgimage build' and start serving again")
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	sum := sha256.New()
	_, err = io.Copy(io.MultiWriter(out, sum), in)
	if err = errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("copy /%s of the root to memory: %w", krgFile, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); !strings.EqualFold(got, wantSHA256) {
		return rescue.Hint(fmt.Errorf("the root's /%s doesn't belong to its image: sha256 is %s, /%s says %q", krgFile, got, imageFile, wantSHA256),
			"something changed the file, or an upgrade of the root was cut short: run 'krgimage build' and start serving again")
	}
	return nil
}

// privateDirs are directories of the host part that must work without the file
// server: they don't show what the shared root has under that name, so a path
// below them is never looked up over NFS.
var privateDirs = map[string]os.FileMode{
	"dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755, "tmp": 0o777 | os.ModeSticky,
}

// makeOverlay mounts at dir what the host part sees as its root: the shared
// root, unchangeable, with a layer in memory over it.
func makeOverlay(lower, dir string) error {
	layer := "/overlay"
	if err := mountAt("tmpfs", layer, "tmpfs", 0, "mode=0755,size=25%"); err != nil {
		return err
	}
	for _, d := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(layer, d), 0o755); err != nil {
			return err
		}
	}
	for name, mode := range privateDirs {
		d := filepath.Join(layer, "upper", name)
		if err := errors.Join(os.Mkdir(d, 0o755), os.Chmod(d, mode)); err != nil {
			return err
		}
		// Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"
		if err := unix.Setxattr(d, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
			return fmt.Errorf("make %s private: %w", name, err)
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, layer, layer)
	if err := mountAt("overlay", dir, "overlay", 0, options); err != nil {
		return err
	}
	// The overlay holds its own reference.
	return unix.Unmount(layer, unix.MNT_DETACH)
}

// mountAt makes the directory and mounts on it.
func mountAt(source, dir, fstype string, flags uintptr, data string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, dir, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fstype, dir, err)
	}
	return nil
}

// switchRoot makes dir the root of all processes, moving the mounts of stage 1
// along, and frees the memory of the initramfs.
func switchRoot(dir string, move map[string]string) error {
	old, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the initramfs: %w", err)
	}
	defer unix.Close(old)
	for _, from := range []string{"/dev", "/proc", "/sys", "/run", "/nfsroot"} { // /run before what goes below it
		to := filepath.Join(dir, move[from])
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(from, to, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s to %s: %w", from, to, err)
		}
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := errors.Join(unix.Chroot("."), unix.Chdir("/")); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(old, &st); err == nil {
		removeAll(old, st.Dev)
	}
	return nil
}

// removeAll deletes what is in the directory fd, staying on device dev. What
// can't be deleted only costs memory.
func removeAll(fd int, dev uint64) {
	dup, err := unix.Dup(fd)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(dup), "initramfs")
	names, _ := f.Readdirnames(-1)
	f.Close()
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Dev != dev {
			continue
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			_ = unix.Unlinkat(fd, name, 0)
			continue
		}
		if sub, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err == nil {
			removeAll(sub, dev)
			unix.Close(sub)
		}
		_ = unix.Unlinkat(fd, name, unix.AT_REMOVEDIR)
	}
}
