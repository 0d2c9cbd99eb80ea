package nfs

import (
	"bytes"

	"golang.org/x/sys/unix"
)

const (
	progNFS = 100003

	procRead        = 6
	procReadDir     = 16
	procReadDirPlus = 17
)

var nfsNames = [...]string{
	"NULL", "GETATTR", "SETATTR", "LOOKUP", "ACCESS", "READLINK", "READ", "WRITE",
	"CREATE", "MKDIR", "SYMLINK", "MKNOD", "REMOVE", "RMDIR", "RENAME", "LINK",
	"READDIR", "READDIRPLUS", "FSSTAT", "FSINFO", "PATHCONF", "COMMIT",
}

// procedure is one remote procedure. run decodes all its arguments first and
// returns false when they are malformed, with nothing done.
type procedure struct {
	name  string
	run   func(c *call, d *decoder, e *buffer) bool
	once  bool // doing it twice gives another answer: see replayCache
	quick bool // reads attributes, names or little data
}

// nfsProcs is NFS version 3 in the order of its procedure numbers.
var nfsProcs = [len(nfsNames)]procedure{
	{name: "NULL", run: (*call).null, quick: true},
	{name: "GETATTR", run: (*call).getattr, quick: true},
	{name: "SETATTR", run: (*call).setattr, once: true},
	{name: "LOOKUP", run: (*call).lookup, quick: true},
	{name: "ACCESS", run: (*call).access, quick: true},
	{name: "READLINK", run: (*call).readlink, quick: true},
	{name: "READ", run: (*call).read, quick: true},
	{name: "WRITE", run: (*call).write},
	{name: "CREATE", run: (*call).createFile, once: true},
	{name: "MKDIR", run: (*call).mkdir, once: true},
	{name: "SYMLINK", run: (*call).symlink, once: true},
	{name: "MKNOD", run: (*call).mknod, once: true},
	{name: "REMOVE", run: (*call).removeFile, once: true},
	{name: "RMDIR", run: (*call).removeDir, once: true},
	{name: "RENAME", run: (*call).rename, once: true},
	{name: "LINK", run: (*call).link, once: true},
	{name: "READDIR", run: (*call).readdir},
	{name: "READDIRPLUS", run: (*call).readdirplus},
	{name: "FSSTAT", run: (*call).fsstat, quick: true},
	{name: "FSINFO", run: (*call).fsinfo, quick: true},
	{name: "PATHCONF", run: (*call).pathconf, quick: true},
	{name: "COMMIT", run: (*call).commit},
}

// call is one request being worked on.
type call struct {
	srv    *Server
	id     identity // as sent; see as
	failed bool     // the answer's status is not OK
	nowait bool     // give up what would have to wait for a disk ...
	again  bool     // ... and say so: nothing was done, and the reply is void
	redo   bool     // a process that was killed may have done the call: done already is done

	held   []*file // released at the end
	locked []*file // whose change lock is held
}

// reset makes c ready for another request.
func (c *call) reset(s *Server, id identity) {
	*c = call{srv: s, id: id, nowait: c.nowait, held: c.held[:0], locked: c.locked[:0]}
}

// note remembers whether the call failed, and returns the status.
func (c *call) note(st status) status {
	c.failed = c.failed || st != ok
	return st
}

// hold has a referenced file released at the call's end.
func (c *call) hold(f *file) *file {
	c.held = append(c.held, f)
	return f
}

func (c *call) releaseAll() {
	for _, f := range c.locked {
		f.change.Unlock()
	}
	for _, f := range c.held {
		f.release()
	}
}

// file resolves a handle from the arguments for the time of the call.
func (c *call) file(wire []byte) (*file, status) {
	f, st := c.srv.resolve(wire)
	if st != ok {
		return nil, st
	}
	return c.hold(f), ok
}

// dir is file for a handle that must be a directory's.
func (c *call) dir(wire []byte) (*file, status) {
	f, st := c.file(wire)
	if st == ok && f.kind() != kindDir {
		st = errNotDir
	}
	return f, st
}

// as is who the caller is in an export.
func (c *call) as(x *export) identity {
	if x.RootSquash {
		return c.id.squash()
	}
	return c.id
}

// create runs fn, which makes a file in the export with the mode, as the caller:
// the kernel checks its permission and takes uid and gid for what is made. fn may
// use descriptors, but not open by handle.
func (c *call) create(x *export, mode uint32, fn func() error) error {
	id, threads := c.as(x), c.srv.threads
	switch {
	case mode&threads.umask != 0:
		var err error
		if e := threads.run(id, func() { err = fn() }); e != nil {
			return e
		}
		return err
	case id.uid == threads.own.uid && id.gid == threads.own.gid && id.root():
		return fn()
	}
	return threads.here(id, fn)
}

// change is create for an fn that makes no file: root's gid plays no part.
func (c *call) change(x *export, fn func() error) error {
	id := c.as(x)
	if id.root() {
		return fn()
	}
	return c.srv.threads.here(id, fn)
}

// permitted asks whether the caller has the permissions on the file.
func (c *call) permitted(f *file, st *unix.Stat_t, want uint32) bool {
	return f.permitted(c.as(f.x), st, want)
}

// begin and done bracket a change of one file, begin2 and done2 of two that may
// be the same.
func (c *call) begin(w *wcc, f *file) {
	w.f = f
	f.change.Lock()
	c.locked = append(c.locked, f)
	w.hasPre = f.stat(&w.pre) == nil
}

func (c *call) done(w *wcc) {
	w.has = w.f.stat(&w.post) == nil
	w.f.change.Unlock()
	for i, f := range c.locked {
		if f == w.f {
			c.locked = append(c.locked[:i], c.locked[i+1:]...)
			break
		}
	}
}

// begin2 locks in an order that two requests can't take crosswise.
func (c *call) begin2(a, b *wcc, fa, fb *file) {
	switch {
	case fa == fb:
		c.begin(a, fa)
		*b = *a
	case fa.x == fb.x && fa.h < fb.h || fa.x != fb.x && fa.x.id < fb.x.id:
		c.begin(a, fa)
		c.begin(b, fb)
	default:
		c.begin(b, fb)
		c.begin(a, fa)
	}
}

func (c *call) done2(a, b *wcc) {
	c.done(a)
	if b.f == a.f {
		b.post, b.has = a.post, a.has
		return
	}
	c.done(b)
}

// name reads a filename3. Any length is decoded: checkName answers it properly.
func (d *decoder) name() string { return string(d.opaque(maxRecord)) }

// checkName says whether a name can be a directory entry.
func checkName(name string) status {
	switch {
	case len(name) > 255:
		return errNameTooLong
	case name == "", bytes.ContainsAny([]byte(name), "/\x00"):
		return errAcces
	}
	return ok
}

// checkNew is checkName for a name to be made or taken away.
func checkNew(name string, dots status) status {
	if name == "." || name == ".." {
		return dots
	}
	return checkName(name)
}

func (c *call) null(*decoder, *buffer) bool { return true }
