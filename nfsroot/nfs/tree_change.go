package nfs

import (
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/meta"
)

// The changes of backend.go for a tree: the same permissions and the same
// effects as the kernel's for local file systems (fs/namei.c, fs/attr.c). The
// change lock of the directory is held, so what is checked stays so. On disk all
// is the user's own, and the system calls can't fail for want of permission.

const setIDs = unix.S_ISUID | unix.S_ISGID

// mayMake checks whether the caller may make a name in a directory, and returns
// the directory's attributes. That the name is there goes before that it could
// not be made.
func (t *keptTree) mayMake(id identity, dir *file, dirfd int, name string) (st unix.Stat_t, err error) {
	if err := dir.stat(&st); err != nil {
		return st, err
	}
	if strings.HasPrefix(name, stagePrefix) || !dir.permitted(id, &st, mayExec) {
		return st, unix.EACCES
	}
	if !dir.x.ReadOnly && dir.permitted(id, &st, mayWrite) {
		return st, nil
	}
	if t.exists(dirfd, name) {
		return st, unix.EEXIST
	}
	if dir.x.ReadOnly {
		return st, unix.EROFS
	}
	return st, unix.EACCES
}

func (t *keptTree) exists(dirfd int, name string) bool {
	var st unix.Stat_t
	return unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

// born is what is kept about a new file in a directory with the attributes st.
func born(id identity, st *unix.Stat_t, mode uint32) meta.Attr {
	a := meta.Attr{Mode: mode, UID: id.uid, GID: id.gid}
	if st.Mode&unix.S_ISGID == 0 {
		return a
	}
	a.GID = st.Gid
	if kindOf(mode) == kindDir {
		a.Mode |= unix.S_ISGID
	} else if mode&(unix.S_ISGID|0o010) == unix.S_ISGID|0o010 && !id.root() && !id.in(a.GID) {
		a.Mode &^= unix.S_ISGID // nobody gets a group's rights by its directory
	}
	return a
}

// openNew is call.openNew.
func (t *keptTree) openNew(id identity, dir *file, dirfd int, name string, mode uint32, a *sattr) (int, kernelHandle, error) {
	dirAttr, err := t.mayMake(id, dir, dirfd, name)
	if err != nil {
		return -1, "", err
	}
	kept := born(id, &dirAttr, unix.S_IFREG|mode)
	rest := *a
	rest.hasMode = false
	fd, staged, err := t.stage(dirfd)
	if err != nil {
		return -1, "", err
	}
	// What can't be set leaves a file without it, as in the kernel.
	var refused error
	if rest.hasSize {
		if refused = unix.Ftruncate(fd, int64(rest.size)); !id.root() {
			kept.Mode = dropSetIDs(id, &kept)
		}
	}
	if refused == nil {
		_, refused = rest.judge(id, &kept)
	}
	if ts, set := rest.timespecs(); set && refused == nil {
		refused = unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
	}
	h, err := t.place(fd, staged, kept, dir, dirfd, name)
	if err != nil {
		unix.Close(fd)
		return -1, "", err
	}
	return fd, h, refused
}

// stage makes an empty file that has no name yet, or one that clients don't see.
func (t *keptTree) stage(dirfd int) (fd int, name string, err error) {
	if !t.noTmpfile.Load() {
		fd, err = unix.Openat(dirfd, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
			return fd, "", err
		}
		t.noTmpfile.Store(true)
	}
	name = t.newStage()
	fd, err = unix.Openat(dirfd, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	return fd, name, err
}

func (t *keptTree) newStage() string { return t.stageName + strconv.FormatUint(t.staged.Add(1), 16) }

// place finishes a staged file: with its attribute it gets its name, so that
// neither clients nor a crash ever see it without. It fails if the name is there.
func (t *keptTree) place(fd int, staged string, kept meta.Attr, dir *file, dirfd int, name string) (kernelHandle, error) {
	st := unix.Stat_t{Mode: unix.S_IFREG | 0o600}
	err := meta.Write(fd, &st, kept)
	if err == nil && staged == "" {
		// Through /proc, which needs no capability; AT_EMPTY_PATH does.
		err = unix.Linkat(unix.AT_FDCWD, procPath(fd), dirfd, name, unix.AT_SYMLINK_FOLLOW)
	} else if err == nil {
		err = renameNew(dirfd, staged, name)
	}
	if err != nil {
		if staged != "" {
			unix.Unlinkat(dirfd, staged, 0)
		}
		return "", err
	}
	h, err := t.handleAt(fd, "")
	if err == nil {
		t.add(h, dir.h, name)
	}
	return h, err
}

// renameNew renames in a directory if the new name is not there.
func renameNew(dirfd int, from, to string) error {
	err := unix.Renameat2(dirfd, from, dirfd, to, unix.RENAME_NOREPLACE)
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	// A file system without that flag. The directory's change lock keeps other
	// requests away.
	var st unix.Stat_t
	if unix.Fstatat(dirfd, to, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
		return unix.EEXIST
	}
	return unix.Renameat(dirfd, from, dirfd, to)
}

// makeNode is call.makeNode.
func (t *keptTree) makeNode(id identity, dir *file, dirfd int, name string, n *newNode) error {
	dirAttr, err := t.mayMake(id, dir, dirfd, name)
	if err != nil {
		return err
	}
	mode := n.mode & 0o7777
	switch n.k {
	case kindDir:
		mode &= 0o1777
	case kindLink:
		mode = 0o777
		if n.target == "" {
			return unix.ENOENT
		}
	case kindBlock, kindChar:
		if !id.root() {
			if t.exists(dirfd, name) {
				return unix.EEXIST
			}
			return unix.EPERM
		}
	}
	kept := born(id, &dirAttr, mode|uint32(n.k)<<12)
	kept.Rdev = n.dev
	if n.k == kindDir {
		return t.makeDir(dirfd, name, kept)
	}
	fd, staged, err := t.stage(dirfd)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if n.k == kindLink {
		if _, err := pwriteAll(fd, []byte(n.target), 0); err != nil {
			if staged != "" {
				unix.Unlinkat(dirfd, staged, 0)
			}
			return err
		}
	}
	_, err = t.place(fd, staged, kept, dir, dirfd, name)
	return err
}

func (t *keptTree) makeDir(dirfd int, name string, kept meta.Attr) error {
	staged := t.newStage()
	if err := unix.Mkdirat(dirfd, staged, 0o700); err != nil {
		return err
	}
	err := func() error {
		fd, err := unix.Openat(dirfd, staged, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		st := unix.Stat_t{Mode: unix.S_IFDIR | 0o700}
		if err := meta.Write(fd, &st, kept); err != nil {
			return err
		}
		return renameNew(dirfd, staged, name)
	}()
	if err != nil {
		unix.Unlinkat(dirfd, staged, unix.AT_REMOVEDIR)
	}
	return err
}

// judge applies owner and mode to what is kept about a file, if the caller may,
// and says whether that is a change.
func (a *sattr) judge(id identity, kept *meta.Attr) (changed bool, err error) {
	if a.hasUID || a.hasGID {
		owner := id.uid == kept.UID
		if a.hasUID && !id.root() && !(owner && a.uid == kept.UID) ||
			a.hasGID && !id.root() && !(owner && (a.gid == kept.GID || id.in(a.gid))) {
			return false, unix.EPERM
		}
		if kindOf(kept.Mode) != kindDir {
			kept.Mode = dropSetIDs(id, kept)
		}
		if a.hasUID {
			kept.UID = a.uid
		}
		if a.hasGID {
			kept.GID = a.gid
		}
		changed = true
	}
	if a.hasMode && kindOf(kept.Mode) != kindLink {
		if !id.root() && id.uid != kept.UID {
			return changed, unix.EPERM
		}
		mode := a.mode & 0o7777
		if !id.root() && !id.in(kept.GID) {
			mode &^= unix.S_ISGID
		}
		kept.Mode = kept.Mode&unix.S_IFMT | mode
		changed = true
	}
	return changed, nil
}

// dropSetIDs is a mode without the bits that a change of owner, or of contents
// by a user, takes away: set-gid stays as the mark that it is without group
// execution, for those in the group.
func dropSetIDs(id identity, kept *meta.Attr) uint32 {
	mode := kept.Mode &^ unix.S_ISUID
	if mode&0o010 != 0 || !id.root() && !id.in(kept.GID) {
		mode &^= unix.S_ISGID
	}
	return mode
}

// applyTo is call.applyTo.
func (t *keptTree) applyTo(id identity, f *file, fd, rw int, a *sattr) error {
	if f.x.ReadOnly {
		return unix.EROFS
	}
	var st unix.Stat_t
	if err := f.stat(&st); err != nil {
		return err
	}
	if a.hasSize {
		if err := t.changeContents(id, f, fd, func() error { return unix.Ftruncate(rw, int64(a.size)) }); err != nil {
			return err
		}
		if err := f.stat(&st); err != nil {
			return err
		}
	}
	kept := meta.Attr{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev}
	changed, refused := a.judge(id, &kept)
	if changed {
		if err := t.keep(f, fd, kept); err != nil {
			return err
		}
	}
	ts, set := a.timespecs()
	if refused != nil || !set {
		return refused
	}
	if !id.root() && id.uid != kept.UID {
		// Only to the present, both at once, and who may write.
		if ts[0].Nsec != unix.UTIME_NOW || ts[1].Nsec != unix.UTIME_NOW {
			return unix.EPERM
		}
		if st.Mode = kept.Mode; !f.permitted(id, &st, mayWrite) {
			return unix.EACCES
		}
	}
	return unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
}

// changeContents runs what changes a regular file's contents, which takes the
// set-id bits away unless root does it.
func (t *keptTree) changeContents(id identity, f *file, fd int, change func() error) error {
	if id.root() {
		return change()
	}
	var st unix.Stat_t
	if err := f.stat(&st); err != nil {
		return err
	}
	if st.Mode&setIDs != 0 {
		kept := meta.Attr{Mode: st.Mode, UID: st.Uid, GID: st.Gid}
		if kept.Mode = dropSetIDs(id, &kept); kept.Mode != st.Mode {
			if err := t.keep(f, fd, kept); err != nil {
				return err
			}
		}
	}
	return change()
}

// entry is a name in a directory and what is kept about its file.
type treeEntry struct {
	h  kernelHandle
	st unix.Stat_t
}

// entryOf looks a name up.
func (t *keptTree) entryOf(dirfd int, name string) (e treeEntry, err error) {
	if strings.HasPrefix(name, stagePrefix) {
		return e, unix.ENOENT
	}
	fd, err := unix.Openat2(dirfd, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: beneath})
	if err != nil {
		return e, err
	}
	defer unix.Close(fd)
	if e.h, err = t.handleAt(fd, ""); err != nil {
		return e, err
	}
	if err := unix.Fstat(fd, &e.st); err != nil {
		return e, err
	}
	t.read(fd, &e.st).Show(&e.st)
	return e, nil
}

// mayTake checks whether the caller may take a name out of a directory, whose
// search permission was checked.
func (t *keptTree) mayTake(id identity, dir *file, dirAttr *unix.Stat_t, e *treeEntry) error {
	if !dir.permitted(id, dirAttr, mayWrite|mayExec) {
		return unix.EACCES
	}
	if dirAttr.Mode&unix.S_ISVTX != 0 && !id.root() && id.uid != e.st.Uid && id.uid != dirAttr.Uid {
		return unix.EPERM
	}
	return nil
}

// search reads a directory's attributes and checks that the caller may search it.
func (t *keptTree) search(id identity, dir *file, st *unix.Stat_t) error {
	if dir.x.ReadOnly {
		return unix.EROFS
	}
	if err := dir.stat(st); err != nil {
		return err
	}
	if !dir.permitted(id, st, mayExec) {
		return unix.EACCES
	}
	return nil
}

// unlink is call.unlink.
func (t *keptTree) unlink(id identity, dir *file, dirfd int, name string, flags int) error {
	var dirAttr unix.Stat_t
	if err := t.search(id, dir, &dirAttr); err != nil {
		return err
	}
	e, err := t.entryOf(dirfd, name)
	if err != nil {
		return err
	}
	if err := t.mayTake(id, dir, &dirAttr, &e); err != nil {
		return err
	}
	if err := unix.Unlinkat(dirfd, name, flags); err != nil {
		return err
	}
	t.forget(e.h, dir.h, name)
	return nil
}

// renameTo is call.renameTo.
func (t *keptTree) renameTo(id identity, from *file, fromFD int, fromName string, to *file, toFD int, toName string) error {
	var fromAttr, toAttr unix.Stat_t
	if err := t.search(id, from, &fromAttr); err != nil {
		return err
	}
	if err := t.search(id, to, &toAttr); err != nil {
		return err
	}
	if strings.HasPrefix(toName, stagePrefix) {
		return unix.EACCES
	}
	moved, err := t.entryOf(fromFD, fromName)
	if err != nil {
		return err
	}
	victim, err := t.entryOf(toFD, toName)
	there := err == nil
	switch {
	case err != nil && !errors.Is(err, unix.ENOENT):
		return err
	case there && victim.h == moved.h:
		return nil // two names of one file: rename(2) leaves both
	}
	isDir, overDir := kindOf(moved.st.Mode) == kindDir, there && kindOf(victim.st.Mode) == kindDir
	switch {
	case isDir && t.above(moved.h, to.h):
		return unix.EINVAL
	case overDir && t.above(victim.h, from.h):
		return unix.ENOTEMPTY
	}
	if err := t.mayTake(id, from, &fromAttr, &moved); err != nil {
		return err
	}
	if there {
		err = t.mayTake(id, to, &toAttr, &victim)
		switch {
		case err != nil:
		case isDir && !overDir:
			err = unix.ENOTDIR
		case overDir && !isDir:
			err = unix.EISDIR
		}
	} else if err = nil; !to.permitted(id, &toAttr, mayWrite|mayExec) {
		err = unix.EACCES
	}
	if err != nil {
		return err
	}
	// The directory's own ".." is changed.
	if isDir && from != to && !from.permitted(id, &moved.st, mayWrite) {
		return unix.EACCES
	}
	t.names.Lock()
	defer t.names.Unlock()
	if err := unix.Renameat(fromFD, fromName, toFD, toName); err != nil {
		return err
	}
	if there {
		t.forget(victim.h, to.h, toName)
	}
	t.forget(moved.h, from.h, fromName)
	t.add(moved.h, to.h, toName)
	return nil
}

// linkTo is call.linkTo.
func (t *keptTree) linkTo(id identity, f *file, fd int, dir *file, dirfd int, name string) error {
	var dirAttr, st unix.Stat_t
	if err := dir.stat(&dirAttr); err != nil {
		return err
	}
	if err := f.stat(&st); err != nil {
		return err
	}
	// That the file may not be linked to goes before that the directory may not
	// be written, but after that it may not be searched.
	if t.linkOwn && !dir.x.ReadOnly && dir.permitted(id, &dirAttr, mayExec) && !id.root() && id.uid != st.Uid {
		dangerous := st.Mode&unix.S_ISUID != 0 || st.Mode&(unix.S_ISGID|0o010) == unix.S_ISGID|0o010
		if f.kind() != kindReg || dangerous || !f.permitted(id, &st, mayRead|mayWrite) {
			if t.exists(dirfd, name) {
				return unix.EEXIST
			}
			return unix.EPERM
		}
	}
	if _, err := t.mayMake(id, dir, dirfd, name); err != nil {
		return err
	}
	if err := unix.Linkat(unix.AT_FDCWD, procPath(fd), dirfd, name, unix.AT_SYMLINK_FOLLOW); err != nil {
		return err
	}
	t.add(f.h, dir.h, name)
	return nil
}
