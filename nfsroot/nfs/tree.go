package nfs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/meta"
)

// keptTree is what stands behind an export that is served without privilege: a
// directory tree whose files all belong to the user on disk and whose owners,
// modes and types are in attributes (package meta). What the kernel does for
// other exports is done here:
//
//	tree.go         files are opened by handle, and shown as they are meant
//	places.go       ... by a table that knows where each handle's file lies
//	tree_change.go  permissions are checked, and changes made
//
// Handles are the kernel's here too (name_to_handle_at(2) takes no privilege),
// so they depend on the file alone. Only the way back, open_by_handle_at(2), is
// not open to users. The table stands in for it; it is made anew by walking the
// tree at each start, and what it says is always checked against the handle of
// what was opened.
type keptTree struct {
	log  *slog.Logger
	dir  string
	root int // the top, for reading
	top  kernelHandle
	// mount is the top's mount id, -1 where the file system has no handles.
	mount int32
	// linkOwn says that only who could open a file may link to it, as the
	// host's kernel has it (fs.protected_hardlinks, Documentation/admin-guide/sysctl/fs.rst).
	linkOwn bool
	// stageName names files that are being made, for this process alone.
	stageName string
	staged    atomic.Uint64
	noTmpfile atomic.Bool // the file system has no O_TMPFILE

	// names is held for writing while a file changes its place, for reading
	// while one is looked for.
	names sync.RWMutex

	mu     sync.Mutex
	places *places // guarded by mu
	walk   *walk   // of the tree, running; guarded by mu
	walked walk    // the last one that ended; guarded by mu
	ctx    context.Context
	stop   context.CancelFunc
	walks  sync.WaitGroup
}

// stagePrefix begins the names of files that are not in place yet. Clients don't
// see them; those of a process that was killed go with the next start.
const stagePrefix = ".krgimage-nfs-"

// beneath lets the kernel resolve a name in the tree: over no link, no mount
// point, and not out.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// openTree opens a tree that the calling user keeps at dir.
func openTree(dir string, log *slog.Logger, instance uint64) (_ *keptTree, err error) {
	if err := meta.Supported(dir); err != nil {
		return nil, err
	}
	kept, err := meta.Marked(dir)
	if err != nil {
		return nil, fmt.Errorf("directory to serve: %w", err)
	}
	if !kept {
		return nil, fmt.Errorf("%s was not made without root; serve it as root", dir)
	}
	t := &keptTree{log: log, dir: dir, mount: -1, root: -1, places: newPlaces(maphash.MakeSeed()), stageName: fmt.Sprintf("%s%016x-", stagePrefix, instance)}
	if t.root, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("opening %s: %w", dir, err)
	}
	defer func() {
		if err != nil {
			unix.Close(t.root)
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(t.root, &st); err != nil {
		return nil, fmt.Errorf("opening %s: %w", dir, err)
	}
	if uid := os.Geteuid(); uint32(uid) != st.Uid {
		return nil, fmt.Errorf("%s belongs to the user with uid %d, and this is %d: run it as that user", dir, st.Uid, uid)
	}
	if _, mount, err := handleAndMount(t.root, ""); err == nil {
		t.mount = mount
	}
	if t.top, err = t.handleAt(t.root, ""); err != nil {
		return nil, fmt.Errorf("%w: %s (%w); put the tree on ext4, xfs, btrfs or tmpfs", ErrNoHandles, dir, err)
	}
	if text, err := os.ReadFile("/proc/sys/fs/protected_hardlinks"); err != nil || strings.TrimSpace(string(text)) != "0" {
		t.linkOwn = true
	}
	t.ctx, t.stop = context.WithCancel(context.Background())
	t.mu.Lock()
	t.startWalk()
	t.mu.Unlock()
	return t, nil
}

// close ends the walk and closes the tree.
func (t *keptTree) close() {
	t.stop()
	t.walks.Wait()
	unix.Close(t.root)
}

// inodeHandle is the type of handles where the kernel has none: inode number
// and time of birth.
const inodeHandle = 0x6b726700

// handleAt is the function of that name for files of the tree: what is mounted
// into it is not part of it.
func (t *keptTree) handleAt(dirfd int, name string) (kernelHandle, error) {
	if t.mount >= 0 {
		h, mount, err := handleAndMount(dirfd, name)
		if err == nil && mount != t.mount {
			return "", unix.EXDEV
		}
		return h, err
	}
	flags := 0
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	}
	var st unix.Statx_t
	if err := unix.Statx(dirfd, name, flags|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_BTIME, &st); err != nil {
		return "", err
	}
	if st.Mask&unix.STATX_BTIME == 0 {
		return "", unix.EOPNOTSUPP // an inode number alone may come again
	}
	b := make([]byte, 0, 4+8+8+4)
	b = binary.BigEndian.AppendUint32(b, inodeHandle)
	b = binary.BigEndian.AppendUint64(b, st.Ino)
	b = binary.BigEndian.AppendUint64(b, uint64(st.Btime.Sec))
	return kernelHandle(binary.BigEndian.AppendUint32(b, st.Btime.Nsec)), nil
}

// handleOf returns the handle of a name in a directory and remembers the place.
func (t *keptTree) handleOf(dir *file, dirfd int, name string) (kernelHandle, error) {
	if strings.HasPrefix(name, stagePrefix) {
		return "", unix.ENOENT
	}
	h, err := t.handleAt(dirfd, name)
	if err == nil && name != ".." && name != "." {
		t.add(h, dir.h, name)
	}
	return h, err
}

// open returns an O_PATH descriptor of a handle's file.
func (t *keptTree) open(h kernelHandle) (int, error) {
	if h == t.top {
		return unix.Openat(t.root, ".", unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	for {
		fd, err := t.find(h)
		if err == nil || !errors.Is(err, unix.ESTALE) {
			return fd, err
		}
		if !t.refresh() {
			return -1, unix.ESTALE
		}
	}
}

// find tries the places that are known of a handle.
func (t *keptTree) find(h kernelHandle) (int, error) {
	t.names.RLock()
	defer t.names.RUnlock()
	for n := 0; ; n++ {
		path, known := t.path(h, n)
		if !known {
			return -1, unix.ESTALE
		}
		fd, err := t.openPath(path, unix.O_PATH)
		switch {
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
			return -1, err
		case err != nil:
			continue
		}
		if got, err := t.handleAt(fd, ""); err == nil && got == h {
			return fd, nil
		}
		unix.Close(fd)
	}
}

// maxStep is how much of a path is given to the kernel at once: it takes
// PATH_MAX bytes, while a tree may be deeper.
const maxStep = 3000

// openPath opens a path from the top.
func (t *keptTree) openPath(path string, flags uint64) (int, error) {
	at := t.root
	for {
		step, how := path, unix.OpenHow{Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: beneath}
		path = ""
		if len(step) > maxStep {
			cut := strings.LastIndexByte(step[:maxStep], '/')
			step, path = step[:cut], step[cut+1:]
			how.Flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
		}
		fd, err := unix.Openat2(at, step, &how)
		if at != t.root {
			unix.Close(at)
		}
		if err != nil || path == "" {
			return fd, err
		}
		at = fd
	}
}

// openEntry opens a name whose handle is known, in a directory.
func (t *keptTree) openEntry(dirfd int, name string, h kernelHandle) (int, error) {
	if name == ".." || name == "." {
		return t.open(h)
	}
	fd, err := unix.Openat2(dirfd, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: beneath})
	if err != nil {
		return -1, err
	}
	if got, err := t.handleAt(fd, ""); err != nil || got != h {
		unix.Close(fd)
		return -1, unix.ESTALE
	}
	return fd, nil
}

// entryAttr is file.entryAttr.
func (t *keptTree) entryAttr(dirfd int, name string, h kernelHandle, st *unix.Stat_t) error {
	fd, err := t.openEntry(dirfd, name, h)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, st); err != nil {
		return err
	}
	t.read(fd, st).Show(st)
	return nil
}

// reopen opens a file for more than its attributes, given an O_PATH descriptor.
func (t *keptTree) reopen(fd, flags int) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, err
	}
	if k := kindOf(st.Mode); k != kindReg && k != kindDir {
		return -1, unix.EINVAL // put there by the user; opening it could wait or act
	}
	path := procPath(fd)
	got, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EACCES) {
		// A file of the user's that he has taken permissions from. They go to
		// the attribute, the file gets what the server needs.
		if err := meta.WritePath(path, &st, t.read(fd, &st)); err != nil {
			return -1, err
		}
		got, err = unix.Open(path, flags|unix.O_CLOEXEC, 0)
	}
	return got, err
}

// read returns what is kept about an open file, which is st on disk.
func (t *keptTree) read(fd int, st *unix.Stat_t) meta.Attr {
	var buf [meta.MaxText]byte
	// Through /proc because O_PATH descriptors refuse fgetxattr.
	return meta.Of(st, meta.ReadPath(procPath(fd), &buf))
}

// metaState remembers what is kept about a file. Setting it changes ctime.
type metaState struct {
	known bool
	attr  meta.Attr
	ctime unix.Timespec
}

// show turns a file's attributes on disk into those it is meant to have.
func (t *keptTree) show(f *file, fd int, st *unix.Stat_t) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.meta.known || f.meta.ctime != st.Ctim {
		f.meta = metaState{known: true, attr: t.read(fd, st), ctime: st.Ctim}
	}
	f.meta.attr.Show(st)
}

// keep writes what is to be kept about a file.
func (t *keptTree) keep(f *file, fd int, a meta.Attr) error {
	f.mu.Lock() // show may be reading it
	defer f.mu.Unlock()
	f.meta.known = false
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if err := meta.WritePath(procPath(fd), &st, a); err != nil {
		return err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	f.meta = metaState{known: true, attr: a, ctime: st.Ctim}
	return nil
}

// readLink reads a symbolic link's target.
func (t *keptTree) readLink(fd int, buf []byte) (int, error) {
	if n, err := unix.Readlinkat(fd, "", buf); err == nil {
		return n, nil // one that the user made
	}
	rd, err := t.reopen(fd, unix.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer unix.Close(rd)
	return unix.Pread(rd, buf, 0)
}
