package nfs

import (
	"golang.org/x/sys/unix"
)

// What requests ask of the operating system about the files of an export.
// Descriptors come from the file cache, names are single components.
//
// There are two back ends. Where the server runs as root, the kernel is the
// judge: it checks the caller's permission, and takes the owner of what is made
// from the calling thread. Without privilege a tree does both (export.tree).

// handleOf returns the handle of a name in the directory, whose descriptor is
// dirfd. A symbolic link is not followed.
func (dir *file) handleOf(dirfd int, name string) (kernelHandle, error) {
	if t := dir.x.tree; t != nil {
		return t.handleOf(dir, dirfd, name)
	}
	return handleAt(dirfd, name)
}

// openByHandle opens the file; mu is held. It must run with the server's own
// identity: only that may open by handle.
func (f *file) openByHandle(flags int) (int, error) {
	t := f.x.tree
	if t == nil {
		return f.h.open(f.x.mount, flags)
	}
	for _, fd := range [...]int{f.path, f.rd, f.rw} {
		if fd >= 0 {
			return t.reopen(fd, flags)
		}
	}
	fd, err := t.open(f.h)
	if err != nil || flags == unix.O_PATH {
		return fd, err
	}
	f.path = fd
	return t.reopen(fd, flags)
}

// readAttr reads the attributes of the file, which is open.
func (f *file) readAttr(fd int, st *unix.Stat_t) error {
	err := unix.Fstat(fd, st)
	if t := f.x.tree; t != nil && err == nil {
		t.show(f, fd, st)
	}
	return err
}

// entryAttr reads the attributes of a name in the directory, whose handle is
// given, without keeping it open.
func (dir *file) entryAttr(dirfd int, name string, h kernelHandle, st *unix.Stat_t) error {
	if t := dir.x.tree; t != nil {
		return t.entryAttr(dirfd, name, h, st)
	}
	// Between the two questions another file may have got the name. Then the
	// handle decides, as where it does not tell its inode number.
	if unix.Fstatat(dirfd, name, st, unix.AT_SYMLINK_NOFOLLOW) == nil && h.names(st.Ino) {
		return nil
	}
	fd, err := h.open(dir.x.mount, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fstat(fd, st)
}

// openNew makes a regular file that must not be there, with the attributes, and
// returns a descriptor for reading and writing, and its handle. Both are good
// also with an error that says that the attributes could not be set.
func (c *call) openNew(dir *file, dirfd int, name string, mode uint32, a *sattr) (fd int, h kernelHandle, err error) {
	if t := dir.x.tree; t != nil {
		return t.openNew(c.as(dir.x), dir, dirfd, name, mode, a)
	}
	fd = -1
	err = c.create(dir.x, mode, func() (err error) {
		fd, err = unix.Openat(dirfd, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		if err != nil {
			return err
		}
		rest := *a
		rest.hasMode = false
		return rest.apply(fd, fd, kindReg)
	})
	if fd < 0 {
		return -1, "", err
	}
	h, herr := handleAt(fd, "")
	if herr != nil {
		unix.Close(fd)
		return -1, "", herr
	}
	return fd, h, err
}

// newNode is what is made by node: all but regular files.
type newNode struct {
	k      kind
	mode   uint32 // permissions
	dev    uint64 // of devices
	target string // of symbolic links
}

// makeNode makes a file other than a regular one.
func (c *call) makeNode(dir *file, dirfd int, name string, n *newNode) error {
	if t := dir.x.tree; t != nil {
		return t.makeNode(c.as(dir.x), dir, dirfd, name, n)
	}
	return c.create(dir.x, n.mode, func() error {
		switch n.k {
		case kindDir:
			return unix.Mkdirat(dirfd, name, n.mode)
		case kindLink:
			return unix.Symlinkat(n.target, dirfd, name)
		default:
			return unix.Mknodat(dirfd, name, n.mode|uint32(n.k)<<12, int(n.dev))
		}
	})
}

// applyTo sets attributes. rw is a descriptor for writing, needed for the size
// alone.
func (c *call) applyTo(f *file, fd, rw int, a *sattr) error {
	if t := f.x.tree; t != nil {
		return t.applyTo(c.as(f.x), f, fd, rw, a)
	}
	return c.change(f.x, func() error { return a.apply(fd, rw, f.kind()) })
}

// writeTo writes at an offset until all is written or something fails; it fails
// only when nothing was written.
func (c *call) writeTo(f *file, fd int, data []byte, off int64) (n int, err error) {
	if t := f.x.tree; t != nil {
		err = t.changeContents(c.as(f.x), f, fd, func() (err error) {
			n, err = pwriteAll(fd, data, off)
			return err
		})
		return n, err
	}
	err = c.change(f.x, func() (err error) {
		n, err = pwriteAll(fd, data, off)
		return err
	})
	return n, err
}

// unlink takes a name away; flags are those of unlinkat(2).
func (c *call) unlink(dir *file, dirfd int, name string, flags int) error {
	if t := dir.x.tree; t != nil {
		return t.unlink(c.as(dir.x), dir, dirfd, name, flags)
	}
	return c.change(dir.x, func() error { return unix.Unlinkat(dirfd, name, flags) })
}

// renameTo is rename(2) between two directories of one export.
func (c *call) renameTo(from *file, fromFD int, fromName string, to *file, toFD int, toName string) error {
	if t := from.x.tree; t != nil {
		return t.renameTo(c.as(from.x), from, fromFD, fromName, to, toFD, toName)
	}
	return c.change(from.x, func() error { return unix.Renameat(fromFD, fromName, toFD, toName) })
}

// linkTo gives a file another name.
func (c *call) linkTo(f *file, fd int, dir *file, dirfd int, name string) error {
	if t := f.x.tree; t != nil {
		return t.linkTo(c.as(f.x), f, fd, dir, dirfd, name)
	}
	// Through /proc, which needs no capability; AT_EMPTY_PATH does.
	return c.change(dir.x, func() error {
		return unix.Linkat(unix.AT_FDCWD, procPath(fd), dirfd, name, unix.AT_SYMLINK_FOLLOW)
	})
}

// readLink reads a symbolic link's target into buf.
func (f *file) readLink(fd int, buf []byte) (int, error) {
	if t := f.x.tree; t != nil {
		return t.readLink(fd, buf)
	}
	return unix.Readlinkat(fd, "", buf)
}
