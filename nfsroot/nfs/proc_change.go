package nfs

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// Procedures that change attributes and names.

func (c *call) setattr(d *decoder, e *buffer) bool {
	wire, a := d.opaque(maxHandle), d.sattr3()
	var guard unix.Timespec
	guarded := d.boolean()
	if guarded {
		guard = d.time3()
	}
	if d.bad {
		return false
	}
	var w wcc
	f, st := c.file(wire)
	if st == ok {
		st = a.valid()
	}
	if st == ok {
		st = c.setAttributes(f, &a, &w, func(now *unix.Stat_t) bool {
			return !guarded || c.redo || uint32(now.Ctim.Sec) == uint32(guard.Sec) && now.Ctim.Nsec == guard.Nsec
		})
	}
	e.u32(uint32(c.note(st)))
	e.wccData(&w)
	return true
}

// setAttributes applies a to the file as the caller; check sees the attributes
// before, under the change lock.
func (c *call) setAttributes(f *file, a *sattr, w *wcc, check func(*unix.Stat_t) bool) status {
	fd, err := f.fd()
	if err != nil {
		return statusOf(err)
	}
	rw := -1
	if a.hasSize {
		var attr unix.Stat_t
		if err := f.stat(&attr); err != nil {
			return statusOf(err)
		}
		switch f.kind() {
		case kindReg:
		case kindDir:
			return errIsDir
		default:
			return errInval
		}
		if st := c.mayIO(f, &attr, mayWrite); st != ok {
			return st
		}
		if rw, err = f.writeFD(); err != nil {
			return statusOf(err)
		}
	}
	c.begin(w, f)
	defer c.done(w)
	if !w.hasPre {
		return errStale
	}
	if !check(&w.pre) {
		return errNotSync
	}
	return statusOf(c.applyTo(f, fd, rw, a))
}

// How CREATE treats a file that is there (createmode3).
const (
	createUnchecked = 0
	createGuarded   = 1
	createExclusive = 2
)

func (c *call) createFile(d *decoder, e *buffer) bool {
	wire, name, how := d.opaque(maxHandle), d.name(), d.u32()
	var a sattr
	var verf [8]byte
	switch how {
	case createUnchecked, createGuarded:
		a = d.sattr3()
	case createExclusive:
		d.fixed(verf[:])
		// The verifier is kept in the times, as the RFC suggests. Mode 0 until
		// the client's SETATTR that follows: nobody else gets in before it.
		a = sattr{hasMode: true, atime: timeClient, mtime: timeClient}
		a.atimeTo.Sec = int64(binary.BigEndian.Uint32(verf[:]) & 0x7fffffff)
		a.mtimeTo.Sec = int64(binary.BigEndian.Uint32(verf[4:]) & 0x7fffffff)
	default:
		return false
	}
	if d.bad {
		return false
	}
	again := kindReg
	if how == createExclusive {
		again = 0 // the verifier says whose file it is
	}
	return c.make(e, wire, name, &a, again, func(dir *file, dirfd int) (*file, status) {
		// A file may come and go between the two attempts; not for ever.
		for range 8 {
			f, st := c.createNew(dir, dirfd, name, &a)
			if st != errExist || how == createGuarded {
				return f, st
			}
			f, st = c.createExisting(dir, name, &a, how)
			if st != errNoEnt {
				return f, st
			}
		}
		return nil, errJukebox
	})
}

// createNew makes a file that must not be there.
func (c *call) createNew(dir *file, dirfd int, name string, a *sattr) (*file, status) {
	mode := uint32(0o644)
	if a.hasMode {
		mode = a.mode
	}
	fd, h, err := c.openNew(dir, dirfd, name, mode, a)
	if fd < 0 {
		return nil, statusOf(err)
	}
	f := c.hold(c.srv.files.get(dir.x, h, kindReg))
	f.adopt(fd)
	return f, statusOf(err)
}

// createExisting is CREATE of a name that is there: fine for UNCHECKED, which
// may truncate it, and for EXCLUSIVE if it is the same call's file.
func (c *call) createExisting(dir *file, name string, a *sattr, how uint32) (*file, status) {
	var dirAttr, attr unix.Stat_t
	if err := dir.stat(&dirAttr); err != nil {
		return nil, statusOf(err)
	}
	f, st := c.child(dir, &dirAttr, name, &attr)
	if st != ok {
		return nil, st
	}
	if how == createExclusive {
		if attr.Size == 0 && f.kind() == kindReg && attr.Atim == a.atimeTo && attr.Mtim == a.mtimeTo {
			return f, ok
		}
		if f.kind() != kindReg || !c.cutShort(&attr) {
			return nil, errExist
		}
		// Whoever comes first makes it his; the verifier tells the others.
		times := sattr{atime: a.atime, mtime: a.mtime, atimeTo: a.atimeTo, mtimeTo: a.mtimeTo}
		mine := true
		st = c.setAttributes(f, &times, new(wcc), func(now *unix.Stat_t) bool {
			mine = c.cutShort(now)
			return mine
		})
		if !mine {
			return nil, errExist
		}
		return f, st
	}
	if a.hasSize && f.kind() == kindReg {
		size := sattr{hasSize: true, size: a.size}
		st = c.setAttributes(f, &size, new(wcc), func(*unix.Stat_t) bool { return true })
	}
	return f, st
}

// cutShort says whether a file is what an EXCLUSIVE CREATE of the caller leaves
// when the server dies between making the file and giving it the verifier: no
// mode, no content, untouched since it was made, before this server started. The
// client repeats the call and must not be told that somebody else has the name.
func (c *call) cutShort(attr *unix.Stat_t) bool {
	return attr.Mode&0o7777 == 0 && attr.Size == 0 && attr.Uid == c.id.uid &&
		attr.Atim == attr.Ctim && attr.Mtim == attr.Ctim && attr.Ctim.Nano() < c.srv.started.UnixNano()
}

func (c *call) mkdir(d *decoder, e *buffer) bool {
	wire, name, a := d.opaque(maxHandle), d.name(), d.sattr3()
	if d.bad {
		return false
	}
	mode := a.takeMode(0o777)
	return c.make(e, wire, name, &a, kindDir, func(dir *file, dirfd int) (*file, status) {
		return c.node(dir, dirfd, name, &a, &newNode{k: kindDir, mode: mode})
	})
}

func (c *call) symlink(d *decoder, e *buffer) bool {
	wire, name, a, target := d.opaque(maxHandle), d.name(), d.sattr3(), string(d.opaque(maxRecord))
	if d.bad {
		return false
	}
	a.takeMode(0)
	return c.make(e, wire, name, &a, kindLink, func(dir *file, dirfd int) (*file, status) {
		if len(target) >= unix.PathMax {
			return nil, errNameTooLong
		}
		return c.node(dir, dirfd, name, &a, &newNode{k: kindLink, target: target})
	})
}

func (c *call) mknod(d *decoder, e *buffer) bool {
	wire, name, typ := d.opaque(maxHandle), d.name(), d.u32()
	var a sattr
	var dev uint64
	var k kind
	switch typ {
	case 3, 4: // NF3BLK, NF3CHR
		a = d.sattr3()
		dev = unix.Mkdev(d.u32(), d.u32())
		k = kindBlock
		if typ == 4 {
			k = kindChar
		}
	case 6: // NF3SOCK
		a, k = d.sattr3(), kindSocket
	case 7: // NF3FIFO
		a, k = d.sattr3(), kindFIFO
	}
	if d.bad {
		return false
	}
	mode := a.takeMode(0o666)
	return c.make(e, wire, name, &a, k, func(dir *file, dirfd int) (*file, status) {
		if k == 0 {
			return nil, errBadType
		}
		return c.node(dir, dirfd, name, &a, &newNode{k: k, mode: mode, dev: dev})
	})
}

// takeMode takes the mode out of the attributes: it is given at creation.
func (a *sattr) takeMode(def uint32) uint32 {
	if !a.hasMode {
		return def
	}
	a.hasMode = false
	return a.mode
}

// node makes a file other than a regular one, and sets the attributes that are
// left.
func (c *call) node(dir *file, dirfd int, name string, a *sattr, n *newNode) (*file, status) {
	if a.hasSize {
		return nil, errInval
	}
	if err := c.makeNode(dir, dirfd, name, n); err != nil {
		return nil, statusOf(err)
	}
	h, err := dir.handleOf(dirfd, name)
	if err != nil {
		return nil, statusOf(err)
	}
	f := c.hold(c.srv.files.get(dir.x, h, n.k))
	fd, err := f.fd()
	if err == nil {
		err = c.applyTo(f, fd, -1, a)
	}
	return f, statusOf(err)
}

// make is the frame of the four procedures that make a file: it checks the
// arguments, brackets the change of the directory and encodes the answer. k is
// what a call that is done again may find there.
func (c *call) make(e *buffer, wire []byte, name string, a *sattr, k kind, mk func(dir *file, dirfd int) (*file, status)) bool {
	var w wcc
	var f *file
	dir, st := c.dir(wire)
	if st == ok {
		st = checkNew(name, errExist)
	}
	if st == ok {
		st = a.valid()
	}
	if st == ok {
		dirfd, err := dir.fd()
		if st = statusOf(err); st == ok {
			c.begin(&w, dir)
			f, st = mk(dir, dirfd)
			if st == errExist && c.redo {
				f, st = c.made(dir, name, k)
			}
			c.done(&w)
		}
	}
	e.u32(uint32(c.note(st)))
	if st == ok {
		e.boolean(true)
		e.opaque(f.handle())
		e.postOp(f)
	}
	e.wccData(&w)
	return true
}

// made finds what a call that is done again has made the first time.
func (c *call) made(dir *file, name string, k kind) (*file, status) {
	var dirAttr, attr unix.Stat_t
	if err := dir.stat(&dirAttr); err != nil {
		return nil, statusOf(err)
	}
	f, st := c.child(dir, &dirAttr, name, &attr)
	if st == ok && (f.kind() != k || attr.Uid != c.as(dir.x).uid) {
		st = errExist
	}
	return f, st
}

func (c *call) removeFile(d *decoder, e *buffer) bool { return c.remove(d, e, 0, errInval) }

func (c *call) removeDir(d *decoder, e *buffer) bool {
	return c.remove(d, e, unix.AT_REMOVEDIR, errExist)
}

func (c *call) remove(d *decoder, e *buffer, flags int, dotdot status) bool {
	wire, name := d.opaque(maxHandle), d.name()
	if d.bad {
		return false
	}
	var w wcc
	dir, st := c.dir(wire)
	if st == ok {
		if name != ".." {
			dotdot = errInval
		}
		st = checkNew(name, dotdot)
	}
	if st == ok {
		dirfd, err := dir.fd()
		if err == nil {
			c.begin(&w, dir)
			h, herr := dir.handleOf(dirfd, name)
			err = c.unlink(dir, dirfd, name, flags)
			if c.redo && errors.Is(err, unix.ENOENT) {
				err = nil
			}
			c.done(&w)
			if err == nil && herr == nil {
				c.srv.files.forget(dir.x, h)
			}
		}
		st = statusOf(err)
	}
	e.u32(uint32(c.note(st)))
	e.wccData(&w)
	return true
}

func (c *call) rename(d *decoder, e *buffer) bool {
	fromWire, fromName := d.opaque(maxHandle), d.name()
	toWire, toName := d.opaque(maxHandle), d.name()
	if d.bad {
		return false
	}
	var from, to wcc
	fromDir, st := c.dir(fromWire)
	var toDir *file
	if st == ok {
		toDir, st = c.dir(toWire)
	}
	if st == ok {
		st = checkNew(fromName, errInval)
	}
	if st == ok {
		st = checkNew(toName, errInval)
	}
	if st == ok && fromDir.x != toDir.x {
		st = errXDev
	}
	if st == ok {
		st = c.renameAt(fromDir, fromName, toDir, toName, &from, &to)
	}
	e.u32(uint32(c.note(st)))
	e.wccData(&from)
	e.wccData(&to)
	return true
}

func (c *call) renameAt(fromDir *file, fromName string, toDir *file, toName string, from, to *wcc) status {
	fromFD, err := fromDir.fd()
	if err != nil {
		return statusOf(err)
	}
	toFD, err := toDir.fd()
	if err != nil {
		return statusOf(err)
	}
	c.begin2(from, to, fromDir, toDir)
	victim, verr := toDir.handleOf(toFD, toName)
	err = c.renameTo(fromDir, fromFD, fromName, toDir, toFD, toName)
	if c.redo && errors.Is(err, unix.ENOENT) && verr == nil {
		err = nil
	}
	moved, merr := toDir.handleOf(toFD, toName)
	c.done2(from, to)
	if err == nil && verr == nil && merr == nil && victim != moved {
		c.srv.files.forget(toDir.x, victim)
	}
	return statusOf(err)
}

func (c *call) link(d *decoder, e *buffer) bool {
	wire, dirWire, name := d.opaque(maxHandle), d.opaque(maxHandle), d.name()
	if d.bad {
		return false
	}
	var w wcc
	f, st := c.file(wire)
	var dir *file
	if st == ok {
		dir, st = c.dir(dirWire)
	}
	if st == ok {
		st = checkNew(name, errExist)
	}
	if st == ok && f.x != dir.x {
		st = errXDev
	}
	if st == ok && f.kind() == kindDir {
		st = errIsDir
	}
	if st == ok {
		fd, err := f.fd()
		if err == nil {
			var dirfd int
			if dirfd, err = dir.fd(); err == nil {
				c.begin(&w, dir)
				err = c.linkTo(f, fd, dir, dirfd, name)
				if c.redo && errors.Is(err, unix.EEXIST) {
					if h, herr := dir.handleOf(dirfd, name); herr == nil && h == f.h {
						err = nil
					}
				}
				c.done(&w)
			}
		}
		st = statusOf(err)
	}
	e.u32(uint32(c.note(st)))
	e.postOp(f)
	e.wccData(&w)
	return true
}
