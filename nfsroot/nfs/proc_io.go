package nfs

import (
	"context"
	"errors"
	"math"
	"unsafe"

	"golang.org/x/sys/unix"
)

// How stable a WRITE is when it is answered (stable_how).
const (
	unstable = 0
	dataSync = 1
	fileSync = 2
)

// maxNowait is the largest READ in bytes that the reader of a connection answers
// itself.
const maxNowait = 64 << 10

// regular is file for READ, WRITE and COMMIT, with the attributes that mayIO
// needs: none for root.
func (c *call) regular(wire []byte, attr *unix.Stat_t) (*file, status) {
	f, st := c.file(wire)
	if st != ok {
		return f, st
	}
	switch f.kind() {
	case kindReg:
		if c.as(f.x).root() {
			return f, ok
		}
		return f, statusOf(f.stat(attr))
	case kindDir:
		return f, errIsDir
	default:
		return f, errInval
	}
}

// mayIO checks a READ or WRITE. The client has checked when its program opened
// the file; an owner who has taken the permission from himself since, or made
// the file without it, goes on with what is open.
func (c *call) mayIO(f *file, attr *unix.Stat_t, want uint32) status {
	id := c.as(f.x)
	if id.root() || id.uid == attr.Uid || f.permitted(id, attr, want) {
		return ok
	}
	// The client reads a program for its user also where only executing is
	// allowed.
	if want == mayRead && f.permitted(id, attr, mayExec) {
		return ok
	}
	return errAcces
}

func (c *call) read(d *decoder, e *buffer) bool {
	wire, off, count := d.opaque(maxHandle), d.u64(), d.u32()
	if d.bad {
		return false
	}
	var attr unix.Stat_t
	f, st := c.regular(wire, &attr)
	if st == ok {
		st = c.mayIO(f, &attr, mayRead)
	}
	var fd int
	if st == ok {
		var err error
		fd, err = f.readFD()
		st = statusOf(err)
	}
	if st != ok {
		e.u32(uint32(c.note(st)))
		e.postOp(f)
		return true
	}
	count = min(count, maxIO)
	if off > math.MaxInt64-maxIO {
		off, count = math.MaxInt64-maxIO, 0
	}
	if c.nowait && count > maxNowait {
		c.again = true
		return true
	}
	want := int(count)
	if count > maxNowait {
		if err := f.stat(&attr); err == nil {
			want = int(min(uint64(count), max(uint64(attr.Size), off)-off))
		}
	}
	// The data goes straight to its place in the reply: after the status, the
	// attributes, count, eof and the length.
	const before = 4 + 4 + fattr3Size + 4 + 4 + 4
	e.grow(before + padded(want))
	at := len(e.b)
	data := e.b[at+before : at+before+want : cap(e.b)]
	n := 0
	for n < want {
		m, err := pread(fd, data[n:], int64(off)+int64(n), c.nowait)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if c.nowait && (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EOPNOTSUPP)) {
			c.again = true
			return true
		}
		if err != nil && n == 0 {
			e.u32(uint32(c.note(statusOf(err))))
			e.postOp(f)
			return true
		}
		if err != nil || m == 0 {
			break
		}
		n += m
	}
	e.u32(uint32(ok))
	// Taken after the data: a client that sees these attributes may keep it.
	if f.stat(&attr) != nil {
		attr.Size = int64(off) + int64(n)
	}
	e.boolean(true)
	e.fattr3(f.x, &attr)
	e.u32(uint32(n))
	e.boolean(off+uint64(n) >= uint64(attr.Size))
	e.u32(uint32(n))
	e.b = e.b[:at+before+n]
	e.pad(n)
	return true
}

// pread is pread(2); with nowait it fails with EAGAIN rather than wait for a
// disk.
func pread(fd int, p []byte, off int64, nowait bool) (int, error) {
	if !nowait || len(p) == 0 {
		return unix.Pread(fd, p, off)
	}
	vec := unix.Iovec{Base: &p[0]}
	vec.SetLen(len(p))
	n, _, e := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&vec)), 1, uintptr(off), 0, unix.RWF_NOWAIT)
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

func (c *call) write(d *decoder, e *buffer) bool {
	wire, off, count, stable := d.opaque(maxHandle), d.u64(), d.u32(), d.u32()
	data := d.opaque(maxIO)
	if d.bad || stable > fileSync || int(count) > len(data) {
		return false
	}
	data = data[:count]
	var attr unix.Stat_t
	var w wcc
	f, st := c.regular(wire, &attr)
	if st == ok {
		st = c.mayIO(f, &attr, mayWrite)
	}
	if st == ok && off > math.MaxInt64-maxIO {
		st = errFBig
	}
	n := 0
	if st == ok {
		fd, err := f.writeFD()
		if err == nil {
			c.begin(&w, f)
			n, err = c.writeTo(f, fd, data, int64(off))
			c.done(&w)
		}
		if err == nil && stable != unstable {
			err = c.sync(fd)
		}
		st = statusOf(err)
	}
	e.u32(uint32(c.note(st)))
	e.wccData(&w)
	if st == ok {
		e.u32(uint32(n))
		e.u32(stable)
		e.u64(c.srv.writeVerf.Load())
	}
	return true
}

// pwriteAll writes until all is written or something fails; it fails only when
// nothing was written.
func pwriteAll(fd int, data []byte, off int64) (n int, err error) {
	for n < len(data) {
		m, err := unix.Pwrite(fd, data[n:], off+int64(n))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil && n == 0 {
			return 0, err
		}
		if err != nil || m == 0 {
			break
		}
		n += m
	}
	return n, nil
}

// sync brings a file's data to stable storage, and its size: what is needed to
// find the data again.
func (c *call) sync(fd int) error {
	err := unix.Fdatasync(fd)
	if err != nil {
		// The kernel tells a lost page once; the client must send again all
		// that it has not committed.
		c.srv.bumpVerifier(context.Background(), err)
	}
	return err
}

func (c *call) commit(d *decoder, e *buffer) bool {
	wire := d.opaque(maxHandle)
	d.u64() // offset and count: the whole file is synced
	d.u32()
	if d.bad {
		return false
	}
	var attr unix.Stat_t
	var w wcc
	f, st := c.regular(wire, &attr)
	if st == ok {
		fd, err := f.writeFD()
		if errors.Is(err, unix.EROFS) || errors.Is(err, unix.ETXTBSY) {
			fd, err = f.readFD()
		}
		// Read before: what is written while the sync runs is not covered.
		verf := c.srv.writeVerf.Load()
		if err == nil {
			err = c.sync(fd)
		}
		if st = statusOf(err); st == ok {
			e.u32(uint32(ok))
			e.boolean(false) // before the sync is not before the client's writes
			e.postOp(f)
			e.u64(verf)
			return true
		}
	}
	e.u32(uint32(c.note(st)))
	e.wccData(&w)
	return true
}
