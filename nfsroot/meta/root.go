package meta

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Root is a directory tree whose files have owners: a part of what os.Root can,
// and no name leads out of it. In a Plain tree the file system knows the owners,
// in a Kept one the attribute does.
type Root interface {
	Lstat(name string) (fs.FileInfo, error)
	Stat(name string) (fs.FileInfo, error)
	Readlink(name string) (string, error)
	ReadFile(name string) ([]byte, error)
	// OpenFile opens a regular file; with O_CREATE it needs O_EXCL too.
	OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error)
	Mkdir(name string, perm fs.FileMode) error
	MkdirAll(name string, perm fs.FileMode) error
	Symlink(target, name string) error
	Link(oldname, newname string) error
	// Mknod makes a FIFO or device; mode and dev are those of mknod(2).
	Mknod(name string, mode uint32, dev uint64) error
	Lchown(name string, uid, gid int) error
	Chmod(name string, mode fs.FileMode) error
	Chtimes(name string, atime, mtime time.Time) error
	// SetXattr sets an extended attribute of a regular file or directory.
	SetXattr(name, attr string, value []byte) error
	Remove(name string) error
	RemoveAll(name string) error
	Rename(oldname, newname string) error
	OpenRoot(name string) (Root, error)
	FS() fs.FS
	Close() error
}

// Open opens the tree at dir: a Kept one if kept, else a Plain one.
func Open(dir string, kept bool) (Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	if kept {
		return &Kept{root}, nil
	}
	return Plain{root}, nil
}

// Plain is a tree whose owners the file system knows.
type Plain struct{ *os.Root }

// OpenRoot opens a directory of the tree.
func (p Plain) OpenRoot(name string) (Root, error) {
	root, err := p.Root.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return Plain{root}, nil
}

// Mknod makes a FIFO or device.
func (p Plain) Mknod(name string, mode uint32, dev uint64) error {
	parent, err := p.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := unix.Mknodat(int(parent.Fd()), path.Base(name), mode, int(dev)); err != nil {
		return &fs.PathError{Op: "mknod", Path: name, Err: err}
	}
	return nil
}

// SetXattr sets an extended attribute.
func (p Plain) SetXattr(name, attr string, value []byte) error {
	f, err := p.Root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fsetxattr(int(f.Fd()), attr, value, 0)
}

// Kept is a tree whose owners the attribute knows.
type Kept struct{ disk *os.Root }

// Close closes the tree.
func (k *Kept) Close() error { return k.disk.Close() }

// OpenRoot opens a directory of the tree.
func (k *Kept) OpenRoot(name string) (Root, error) {
	name, err := k.resolve(name, true)
	if err != nil {
		return nil, err
	}
	root, err := k.disk.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return &Kept{root}, nil
}

// maxLinks is how many symbolic links a name may lead over, as in the kernel.
const maxLinks = 40

var errEscapes = errors.New("path escapes from parent")

// resolve follows the placeholders of symbolic links in a name: those of its
// parents, and with follow the one at its end. What is missing is left for the
// caller to find.
func (k *Kept) resolve(name string, follow bool) (string, error) {
	todo := strings.Split(path.Clean(name), "/")
	at := "."
	for links := 0; len(todo) > 0; {
		next := todo[0]
		todo = todo[1:]
		switch {
		case next == "" || next == ".":
			continue
		case next == "..":
			if at == "." {
				return "", &fs.PathError{Op: "open", Path: name, Err: errEscapes}
			}
			at = path.Dir(at)
			continue
		}
		next = path.Join(at, next)
		if len(todo) == 0 && !follow {
			return next, nil
		}
		st, err := k.stat(next)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFLNK {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "open", Path: name, Err: unix.ELOOP}
		}
		target, err := k.target(next)
		if err != nil {
			return "", err
		}
		if path.IsAbs(target) {
			return "", &fs.PathError{Op: "open", Path: name, Err: errEscapes}
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return at, nil
}

// at runs an operation on a name. A parent that is the placeholder of a link
// shows as ENOTDIR; only then the name is resolved.
func (k *Kept) at(name string, op func(name string) error) error {
	err := op(name)
	if !errors.Is(err, unix.ENOTDIR) {
		return err
	}
	real, rerr := k.resolve(name, false)
	if rerr != nil || real == path.Clean(name) {
		return err
	}
	return op(real)
}

// open opens a name that is a regular file or directory on disk, itself.
func (k *Kept) open(name string) (*os.File, error) {
	return k.disk.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

// stat reads the attributes of the name itself, whose parents are resolved.
func (k *Kept) stat(name string) (st unix.Stat_t, err error) {
	info, err := k.disk.Lstat(name)
	if err != nil {
		return st, err
	}
	sys := info.Sys().(*syscall.Stat_t)
	st = unix.Stat_t{Mode: sys.Mode, Ino: sys.Ino, Dev: sys.Dev, Nlink: sys.Nlink, Size: sys.Size, Blocks: sys.Blocks, Rdev: sys.Rdev, Mtim: unix.Timespec(sys.Mtim)}
	var text []byte
	if t := st.Mode & unix.S_IFMT; t == unix.S_IFREG || t == unix.S_IFDIR {
		if f, err := k.open(name); err == nil {
			var buf [MaxText]byte
			text = Read(int(f.Fd()), &buf)
			err = unix.Fstat(int(f.Fd()), &st)
			f.Close()
			if err != nil {
				return st, err
			}
		} else if !errors.Is(err, fs.ErrPermission) {
			return st, err
		}
	}
	Of(&st, text).Show(&st)
	return st, nil
}

// target reads a link, whose parents are resolved.
func (k *Kept) target(name string) (string, error) {
	if target, err := k.disk.Readlink(name); err == nil {
		return target, nil
	}
	text, err := k.disk.ReadFile(name)
	return string(text), err
}

// Lstat returns the attributes of the name itself.
func (k *Kept) Lstat(name string) (info fs.FileInfo, err error) {
	err = k.at(name, func(real string) error {
		st, err := k.stat(real)
		info = fileInfo{path.Base(name), st}
		return err
	})
	if err != nil {
		return nil, err
	}
	return info, nil
}

// Stat is Lstat of what the name leads to.
func (k *Kept) Stat(name string) (fs.FileInfo, error) {
	info, err := k.Lstat(name)
	if err != nil || info.Mode()&fs.ModeSymlink == 0 {
		return info, err
	}
	real, err := k.resolve(name, true)
	if err != nil {
		return nil, err
	}
	st, err := k.stat(real)
	if err != nil {
		return nil, err
	}
	return fileInfo{path.Base(name), st}, nil
}

// Readlink returns a symbolic link's target.
func (k *Kept) Readlink(name string) (target string, err error) {
	err = k.at(name, func(real string) error {
		st, err := k.stat(real)
		if err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			return &fs.PathError{Op: "readlink", Path: name, Err: unix.EINVAL}
		}
		target, err = k.target(real)
		return err
	})
	return target, err
}

// ReadFile reads a file that the name leads to.
func (k *Kept) ReadFile(name string) ([]byte, error) {
	f, err := k.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// OpenFile opens a file that the name leads to, or makes one of root's.
func (k *Kept) OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error) {
	if flag&os.O_CREATE != 0 {
		if flag&os.O_EXCL == 0 {
			return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("O_CREATE without O_EXCL")}
		}
		return k.make(name, flag, Attr{Mode: unix.S_IFREG | unixMode(perm)})
	}
	info, err := k.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() && !info.IsDir() {
		return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	real, err := k.resolve(name, true)
	if err != nil {
		return nil, err
	}
	return k.disk.OpenFile(real, flag|unix.O_NOFOLLOW, 0)
}

// make makes a regular file with the attribute.
func (k *Kept) make(name string, flag int, a Attr) (f *os.File, err error) {
	err = k.at(name, func(real string) error {
		f, err = k.disk.OpenFile(real, flag|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		return err
	})
	if err != nil {
		return nil, err
	}
	st := unix.Stat_t{Mode: unix.S_IFREG | 0o600}
	if err := Write(int(f.Fd()), &st, a); err != nil {
		f.Close()
		k.Remove(name)
		return nil, k.explain("setxattr", name, err)
	}
	return f, nil
}

func (k *Kept) explain(op, name string, err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%s: %w", k.disk.Name(), ErrUnsupported)
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// Symlink makes the placeholder of a symbolic link of root's.
func (k *Kept) Symlink(target, name string) error {
	f, err := k.make(name, os.O_WRONLY, Attr{Mode: unix.S_IFLNK | 0o777})
	if err != nil {
		return err
	}
	_, err = f.WriteString(target)
	return errors.Join(err, f.Close())
}

// Mknod makes the placeholder of a FIFO or device of root's.
func (k *Kept) Mknod(name string, mode uint32, dev uint64) error {
	f, err := k.make(name, os.O_WRONLY, Attr{Mode: mode, Rdev: dev})
	if err != nil {
		return err
	}
	return f.Close()
}

// Mkdir makes a directory of root's.
func (k *Kept) Mkdir(name string, perm fs.FileMode) error {
	return k.at(name, func(real string) error {
		if err := k.disk.Mkdir(real, 0o700); err != nil {
			return err
		}
		return k.change(real, func(a *Attr) { *a = Attr{Mode: unix.S_IFDIR | unixMode(perm)} })
	})
}

// MkdirAll makes a directory and its missing parents.
func (k *Kept) MkdirAll(name string, perm fs.FileMode) error {
	info, err := k.Stat(name)
	switch {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return &fs.PathError{Op: "mkdir", Path: name, Err: unix.ENOTDIR}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if parent := path.Dir(path.Clean(name)); parent != "." {
		if err := k.MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	return k.Mkdir(name, perm)
}

// change changes the attribute of the name itself, whose parents are resolved.
func (k *Kept) change(name string, f func(*Attr)) error {
	info, err := k.disk.Lstat(name)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() && !info.IsDir() {
		return &fs.PathError{Op: "setxattr", Path: name, Err: errors.New("it was not made by krgimage, and its owner can't be kept")}
	}
	file, err := k.open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return err
	}
	var buf [MaxText]byte
	a := Of(&st, Read(int(file.Fd()), &buf))
	f(&a)
	if err := Write(int(file.Fd()), &st, a); err != nil {
		return k.explain("setxattr", name, err)
	}
	return nil
}

// Lchown sets the owner; -1 leaves it.
func (k *Kept) Lchown(name string, uid, gid int) error {
	return k.at(name, func(real string) error {
		return k.change(real, func(a *Attr) {
			if uid >= 0 {
				a.UID = uint32(uid)
			}
			if gid >= 0 {
				a.GID = uint32(gid)
			}
			if a.Mode&unix.S_IFMT == unix.S_IFREG {
				a.Mode &^= unix.S_ISUID | unix.S_ISGID // as chown(2) does
			}
		})
	})
}

// Chmod sets the mode of what the name leads to.
func (k *Kept) Chmod(name string, mode fs.FileMode) error {
	real, err := k.resolve(name, true)
	if err != nil {
		return err
	}
	return k.change(real, func(a *Attr) { a.Mode = a.Mode&unix.S_IFMT | unixMode(mode) })
}

// Chtimes sets the times.
func (k *Kept) Chtimes(name string, atime, mtime time.Time) error {
	return k.at(name, func(real string) error { return k.disk.Chtimes(real, atime, mtime) })
}

// SetXattr keeps those attributes that a user may set. The others are the
// kernel's, such as capabilities of programs, which NFS does not carry.
func (k *Kept) SetXattr(name, attr string, value []byte) error {
	if !strings.HasPrefix(attr, "user.") || attr == Name {
		return nil
	}
	return k.at(name, func(real string) error {
		f, err := k.open(real)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Fsetxattr(int(f.Fd()), attr, value, 0)
	})
}

// Link gives a file another name.
func (k *Kept) Link(oldname, newname string) error {
	return k.at(oldname, func(oldname string) error {
		return k.at(newname, func(newname string) error { return k.disk.Link(oldname, newname) })
	})
}

// Rename renames a file.
func (k *Kept) Rename(oldname, newname string) error {
	oldname, err := k.resolve(oldname, false)
	if err != nil {
		return err
	}
	// Not by at: ENOTDIR can also mean a file in the place of a directory.
	if newname, err = k.resolve(newname, false); err != nil {
		return err
	}
	return k.disk.Rename(oldname, newname)
}

// Remove removes a file or an empty directory.
func (k *Kept) Remove(name string) error { return k.at(name, k.disk.Remove) }

// RemoveAll removes a tree.
func (k *Kept) RemoveAll(name string) error {
	real, err := k.resolve(name, false)
	if err != nil {
		return err
	}
	return k.disk.RemoveAll(real)
}

// FS shows the tree.
func (k *Kept) FS() fs.FS { return keptFS{k} }

type keptFS struct{ k *Kept }

func (f keptFS) Open(name string) (fs.File, error)      { return f.k.OpenFile(name, os.O_RDONLY, 0) }
func (f keptFS) Stat(name string) (fs.FileInfo, error)  { return f.k.Stat(name) }
func (f keptFS) Lstat(name string) (fs.FileInfo, error) { return f.k.Lstat(name) }
func (f keptFS) ReadLink(name string) (string, error)   { return f.k.Readlink(name) }
func (f keptFS) ReadFile(name string) ([]byte, error)   { return f.k.ReadFile(name) }
func (f keptFS) ReadDir(name string) ([]fs.DirEntry, error) {
	real, err := f.k.resolve(name, true)
	if err != nil {
		return nil, err
	}
	entries, err := fs.ReadDir(f.k.disk.FS(), real)
	out := entries[:0]
	for _, e := range entries {
		st, err := f.k.stat(path.Join(real, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return out, err
		}
		out = append(out, fs.FileInfoToDirEntry(fileInfo{e.Name(), st}))
	}
	return out, err
}

// fileInfo is a file's attributes in the form of package os.
type fileInfo struct {
	name string
	st   unix.Stat_t
}

func (i fileInfo) Name() string       { return i.name }
func (i fileInfo) Size() int64        { return i.st.Size }
func (i fileInfo) ModTime() time.Time { return time.Unix(i.st.Mtim.Unix()) }
func (i fileInfo) IsDir() bool        { return i.Mode().IsDir() }

// Sys tells as much as callers of package os ask for.
func (i fileInfo) Sys() any {
	return &syscall.Stat_t{Mode: i.st.Mode, Ino: i.st.Ino, Dev: i.st.Dev, Nlink: i.st.Nlink, Size: i.st.Size,
		Uid: i.st.Uid, Gid: i.st.Gid, Rdev: i.st.Rdev, Mtim: syscall.Timespec(i.st.Mtim)}
}

func (i fileInfo) Mode() fs.FileMode {
	mode := fs.FileMode(i.st.Mode & 0o777)
	for _, m := range [...]struct {
		bit  uint32
		mode fs.FileMode
	}{{unix.S_ISUID, fs.ModeSetuid}, {unix.S_ISGID, fs.ModeSetgid}, {unix.S_ISVTX, fs.ModeSticky}} {
		if i.st.Mode&m.bit != 0 {
			mode |= m.mode
		}
	}
	switch i.st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	case unix.S_IFLNK:
		mode |= fs.ModeSymlink
	case unix.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= fs.ModeSocket
	case unix.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		mode |= fs.ModeDevice
	}
	return mode
}

// unixMode are the permissions of a mode, as in st_mode.
func unixMode(mode fs.FileMode) uint32 {
	m := uint32(mode.Perm())
	for _, b := range [...]struct {
		mode fs.FileMode
		bit  uint32
	}{{fs.ModeSetuid, unix.S_ISUID}, {fs.ModeSetgid, unix.S_ISGID}, {fs.ModeSticky, unix.S_ISVTX}} {
		if mode&b.mode != 0 {
			m |= b.bit
		}
	}
	return m
}
