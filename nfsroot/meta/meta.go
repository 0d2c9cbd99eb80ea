// Package meta lets a user without privilege keep a tree of files that belong to
// root and to anyone else, with devices and all: what only root could tell the
// file system about a file stands beside it, in one extended attribute.
//
//	live    unpacks and maintains such a tree (Kept), as it does one of root's (Plain)
//	nfs     serves it, with permission checks of its own
//
// The attribute is on the file, so it goes where the file goes: it follows
// renames, is shared by hard links, and a crash can't part the two. On disk a
// directory has mode 0700, any other file 0600, and all belong to the user. What
// an attribute can't be on (symbolic links, FIFOs, sockets, devices) is a regular
// file whose attribute says what it stands for; a link's content is its target.
//
// A file without a valid attribute was put there by the user: it counts as
// root's, with its own permissions and no set-id bits.
package meta

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"
)

// Name is the extended attribute's name.
const Name = "user.krgimage.attr"

// ErrUnsupported says that a file system keeps no extended attributes.
var ErrUnsupported = errors.New("the file system keeps no user.* extended attributes\n  fix: put the state directory (--state) on ext4, xfs, btrfs or, from Linux 6.6 on, tmpfs; or run it as root")

// version begins the attribute's text. What follows is st_mode in octal, uid,
// gid and, for devices, major and minor number: "1 100644 0 0", "1 20666 0 0 1 3".
const version = "1"

// Attr is what the attribute says about a file.
type Attr struct {
	Mode     uint32 // st_mode: type and permissions
	UID, GID uint32
	Rdev     uint64 // of devices
}

// Append appends the attribute's text.
func (a Attr) Append(b []byte) []byte {
	b = append(append(b, version...), ' ')
	b = strconv.AppendUint(b, uint64(a.Mode), 8)
	b = strconv.AppendUint(append(b, ' '), uint64(a.UID), 10)
	b = strconv.AppendUint(append(b, ' '), uint64(a.GID), 10)
	if a.device() {
		b = strconv.AppendUint(append(b, ' '), uint64(unix.Major(a.Rdev)), 10)
		b = strconv.AppendUint(append(b, ' '), uint64(unix.Minor(a.Rdev)), 10)
	}
	return b
}

func (a Attr) device() bool {
	return a.Mode&unix.S_IFMT == unix.S_IFCHR || a.Mode&unix.S_IFMT == unix.S_IFBLK
}

// Parse reads the attribute's text.
func Parse(text []byte) (Attr, error) {
	var n [5]uint64
	fields := bytes.Split(text, []byte(" "))
	if string(fields[0]) != version || len(fields) != 4 && len(fields) != 6 {
		return Attr{}, fmt.Errorf("%s is %q, which this version does not know", Name, text)
	}
	for i, f := range fields[1:] {
		base := 10
		if i == 0 {
			base = 8
		}
		var err error
		if n[i], err = strconv.ParseUint(string(f), base, 32); err != nil {
			return Attr{}, fmt.Errorf("%s is %q: %w", Name, text, err)
		}
	}
	a := Attr{Mode: uint32(n[0]), UID: uint32(n[1]), GID: uint32(n[2]), Rdev: unix.Mkdev(uint32(n[3]), uint32(n[4]))}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFIFO, unix.S_IFSOCK:
		if len(fields) == 4 && a.Mode>>16 == 0 {
			return a, nil
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if len(fields) == 6 && a.Mode>>16 == 0 {
			return a, nil
		}
	}
	return Attr{}, fmt.Errorf("%s is %q, which is no file type", Name, text)
}

// Of is what a file is, given the attributes on disk and the text of its
// attribute, nil if there is none.
func Of(disk *unix.Stat_t, text []byte) Attr {
	if text != nil {
		// A placeholder can only be a regular file, and a directory only itself.
		if a, err := Parse(text); err == nil && (a.Mode&unix.S_IFMT == unix.S_IFDIR) == (disk.Mode&unix.S_IFMT == unix.S_IFDIR) {
			return a
		}
	}
	a := Attr{Mode: disk.Mode &^ (unix.S_ISUID | unix.S_ISGID), Rdev: disk.Rdev}
	if disk.Mode&unix.S_IFMT == unix.S_IFLNK {
		a.Mode |= 0o777
	}
	return a
}

// Show makes the attributes on disk those of the file.
func (a Attr) Show(st *unix.Stat_t) {
	st.Uid, st.Gid, st.Rdev = a.UID, a.GID, 0
	if a.device() {
		st.Rdev = a.Rdev
	}
	placeholder := st.Mode&unix.S_IFMT != a.Mode&unix.S_IFMT
	st.Mode = a.Mode
	if placeholder {
		st.Blocks = 0
		if a.Mode&unix.S_IFMT != unix.S_IFLNK {
			st.Size = 0
		}
	}
}

// DiskMode is the mode on disk of a file.
func (a Attr) DiskMode() uint32 {
	if a.Mode&unix.S_IFMT == unix.S_IFDIR {
		return 0o700
	}
	return 0o600
}

// MaxText is more than the length of any attribute.
const MaxText = 64

// Read returns the attribute's text of an open file in buf, nil when it has none
// that can be read. The descriptor must not be one of O_PATH.
func Read(fd int, buf *[MaxText]byte) []byte {
	n, err := unix.Fgetxattr(fd, Name, buf[:])
	return text(buf, n, err)
}

// ReadPath is Read by a path, which is followed.
func ReadPath(path string, buf *[MaxText]byte) []byte {
	n, err := unix.Getxattr(path, Name, buf[:])
	return text(buf, n, err)
}

func text(buf *[MaxText]byte, n int, err error) []byte {
	if err != nil {
		return nil
	}
	return buf[:n]
}

// Write sets the attribute of an open file, of which st is the state on disk.
// The descriptor must not be one of O_PATH.
func Write(fd int, st *unix.Stat_t, a Attr) error {
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFDIR {
		return unix.EPERM // a link or device of the user's: nothing can be kept about it
	}
	if st.Mode&0o600 != 0o600 {
		// The attribute takes write permission.
		if err := unix.Fchmod(fd, st.Mode&0o777|a.DiskMode()); err != nil {
			return err
		}
	}
	var buf [MaxText]byte
	return unix.Fsetxattr(fd, Name, a.Append(buf[:0]), 0)
}

// WritePath is Write by a path, which is followed.
func WritePath(path string, st *unix.Stat_t, a Attr) error {
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFDIR {
		return unix.EPERM
	}
	if st.Mode&0o600 != 0o600 {
		if err := unix.Chmod(path, st.Mode&0o777|a.DiskMode()); err != nil {
			return err
		}
	}
	var buf [MaxText]byte
	return unix.Setxattr(path, Name, a.Append(buf[:0]), 0)
}

// Marked says whether a directory is the top of a tree that is kept this way.
func Marked(dir string) (bool, error) {
	var buf [MaxText]byte
	n, err := unix.Getxattr(dir, Name, buf[:])
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("%s of %s: %w", Name, dir, err)
	}
	_, err = Parse(buf[:n])
	return err == nil, err
}

// Supported tells whether files in dir can have the attribute.
func Supported(dir string) error {
	var buf [MaxText]byte
	_, err := unix.Getxattr(dir, Name, buf[:])
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%s: %w", dir, ErrUnsupported)
	}
	return nil
}
