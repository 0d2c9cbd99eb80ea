package nfs

import (
	"errors"
	"math"

	"golang.org/x/sys/unix"
)

// status is an nfsstat3 (RFC 1813 section 2.6).
type status uint32

const (
	ok             status = 0
	errPerm        status = 1
	errNoEnt       status = 2
	errIO          status = 5
	errNXIO        status = 6
	errAcces       status = 13
	errExist       status = 17
	errXDev        status = 18
	errNoDev       status = 19
	errNotDir      status = 20
	errIsDir       status = 21
	errInval       status = 22
	errFBig        status = 27
	errNoSpc       status = 28
	errROFS        status = 30
	errMLink       status = 31
	errNameTooLong status = 63
	errNotEmpty    status = 66
	errDQuot       status = 69
	errStale       status = 70
	errBadHandle   status = 10001
	errNotSync     status = 10002
	errBadCookie   status = 10003
	errNotSupp     status = 10004
	errTooSmall    status = 10005
	errServerFault status = 10006
	errBadType     status = 10007
	errJukebox     status = 10008
)

var statusByErrno = map[unix.Errno]status{
	unix.EPERM: errPerm, unix.ENOENT: errNoEnt, unix.EIO: errIO, unix.ENXIO: errNXIO,
	unix.EACCES: errAcces, unix.EEXIST: errExist, unix.EXDEV: errXDev, unix.ENODEV: errNoDev,
	unix.ENOTDIR: errNotDir, unix.EISDIR: errIsDir, unix.EINVAL: errInval, unix.EFBIG: errFBig,
	unix.ENOSPC: errNoSpc, unix.EROFS: errROFS, unix.EMLINK: errMLink,
	unix.ENAMETOOLONG: errNameTooLong, unix.ENOTEMPTY: errNotEmpty, unix.EDQUOT: errDQuot,
	unix.ESTALE: errStale, unix.EOPNOTSUPP: errNotSupp, unix.EOVERFLOW: errInval,
	unix.ELOOP: errInval, unix.EBUSY: errAcces, unix.EREMOTE: errIO,
	// The client waits and tries again.
	unix.EAGAIN: errJukebox, unix.EMFILE: errJukebox, unix.ENFILE: errJukebox,
	unix.ENOMEM: errJukebox, unix.EINTR: errJukebox,
}

// statusOf maps a system call's error; what has no counterpart is an I/O error.
func statusOf(err error) status {
	if err == nil {
		return ok
	}
	var e unix.Errno
	if errors.As(err, &e) {
		if st, known := statusByErrno[e]; known {
			return st
		}
	}
	return errIO
}

// ftype maps st_mode to ftype3.
func ftype(mode uint32) uint32 {
	switch kindOf(mode) {
	case kindReg:
		return 1
	case kindDir:
		return 2
	case kindBlock:
		return 3
	case kindChar:
		return 4
	case kindLink:
		return 5
	case kindSocket:
		return 6
	default:
		return 7
	}
}

// time3 encodes an nfstime3: unsigned seconds, so 1970 to 2106; times outside
// become the nearest that fits.
func (e *buffer) time3(t unix.Timespec) {
	switch {
	case t.Sec < 0:
		e.u64(0)
	case t.Sec > math.MaxUint32:
		e.u32(math.MaxUint32)
		e.u32(999_999_999)
	default:
		e.u32(uint32(t.Sec))
		e.u32(uint32(t.Nsec))
	}
}

// fattr3Size is the encoded size of a fattr3 in bytes.
const fattr3Size = 84

func (e *buffer) fattr3(x *export, st *unix.Stat_t) {
	e.u32(ftype(st.Mode))
	e.u32(st.Mode & 0o7777)
	e.u32(uint32(st.Nlink))
	e.u32(st.Uid)
	e.u32(st.Gid)
	e.u64(uint64(st.Size))
	e.u64(uint64(st.Blocks) * 512)
	e.u32(unix.Major(st.Rdev))
	e.u32(unix.Minor(st.Rdev))
	e.u64(x.fsid)
	e.u64(st.Ino)
	e.time3(st.Atim)
	e.time3(st.Mtim)
	e.time3(st.Ctim)
}

// postOp encodes a file's present attributes as a post_op_attr; f may be nil.
func (e *buffer) postOp(f *file) {
	var st unix.Stat_t
	if f == nil || f.stat(&st) != nil {
		e.boolean(false)
		return
	}
	e.boolean(true)
	e.fattr3(f.x, &st)
}

// wcc is a file under change: the attributes before, and those after. The
// file's change lock is held in between; see call.begin.
type wcc struct {
	f           *file
	pre, post   unix.Stat_t
	hasPre, has bool
}

// wccData encodes a wcc_data; a zero wcc encodes "nothing known".
func (e *buffer) wccData(w *wcc) {
	e.boolean(w.hasPre)
	if w.hasPre {
		e.u64(uint64(w.pre.Size))
		e.time3(w.pre.Mtim)
		e.time3(w.pre.Ctim)
	}
	e.boolean(w.has)
	if w.has {
		e.fattr3(w.f.x, &w.post)
	}
}

// timeHow is a time_how.
type timeHow uint32

const (
	timeKeep timeHow = iota
	timeServer
	timeClient
)

// sattr is a decoded sattr3.
type sattr struct {
	hasMode, hasUID, hasGID, hasSize bool
	mode, uid, gid                   uint32
	size                             uint64
	atime, mtime                     timeHow
	atimeTo, mtimeTo                 unix.Timespec
}

func (d *decoder) sattr3() (a sattr) {
	if a.hasMode = d.boolean(); a.hasMode {
		a.mode = d.u32() & 0o7777
	}
	if a.hasUID = d.boolean(); a.hasUID {
		a.uid = d.u32()
	}
	if a.hasGID = d.boolean(); a.hasGID {
		a.gid = d.u32()
	}
	if a.hasSize = d.boolean(); a.hasSize {
		a.size = d.u64()
	}
	a.atime, a.atimeTo = d.setTime()
	a.mtime, a.mtimeTo = d.setTime()
	return a
}

func (d *decoder) setTime() (timeHow, unix.Timespec) {
	how := timeHow(d.u32())
	switch {
	case how == timeClient:
		return how, d.time3()
	case how > timeClient:
		d.bad = true
	}
	return how, unix.Timespec{}
}

func (d *decoder) time3() unix.Timespec {
	sec, nsec := d.u32(), d.u32()
	return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

// valid checks what XDR can't.
func (a *sattr) valid() status {
	if a.hasSize && a.size > math.MaxInt64 {
		return errFBig
	}
	for _, t := range [...]unix.Timespec{a.atimeTo, a.mtimeTo} {
		if t.Nsec > 999_999_999 {
			return errInval
		}
	}
	return ok
}

// timespecs are the arguments of utimensat; set is false when both times stay.
func (a *sattr) timespecs() (ts [2]unix.Timespec, set bool) {
	for i, t := range [...]struct {
		how timeHow
		to  unix.Timespec
	}{{a.atime, a.atimeTo}, {a.mtime, a.mtimeTo}} {
		switch t.how {
		case timeKeep:
			ts[i].Nsec = unix.UTIME_OMIT
		case timeServer:
			if a.hasSize && i == 1 && a.atime == timeKeep {
				// Opening with O_TRUNC asks for this too, and the truncation
				// has done it. Asked for alone, the kernel grants it to the
				// owner only, not to everyone who may write.
				ts[i].Nsec = unix.UTIME_OMIT
				continue
			}
			ts[i].Nsec = unix.UTIME_NOW
			set = true
		case timeClient:
			ts[i] = t.to
			set = true
		}
	}
	return ts, set
}

// apply sets the attributes through a descriptor of the file; it runs as the
// caller, and the kernel judges. rw is a descriptor for writing, needed for the
// size alone. The order keeps what one step would undo for the end: a change of
// size or owner clears set-id bits and touches mtime.
func (a *sattr) apply(fd, rw int, k kind) error {
	if a.hasSize {
		if err := unix.Ftruncate(rw, int64(a.size)); err != nil {
			return err
		}
	}
	if a.hasUID || a.hasGID {
		uid, gid := -1, -1
		if a.hasUID {
			uid = int(a.uid)
		}
		if a.hasGID {
			gid = int(a.gid)
		}
		if err := unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if a.hasMode && k != kindLink {
		// Through /proc: fchmod refuses O_PATH descriptors, and FIFOs, sockets
		// and devices are never opened otherwise.
		if err := unix.Fchmodat(unix.AT_FDCWD, procPath(fd), a.mode, 0); err != nil {
			return err
		}
	}
	ts, set := a.timespecs()
	if !set {
		return nil
	}
	return unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
}
