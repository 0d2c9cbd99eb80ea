package nfs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFile(t *testing.T) {
	dir := t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 0, 0)

	h, a, st := c.create(c.root, "file", createUnchecked, set{mode: to(uint32(0o4755))})
	if st != ok || a.mode != 0o4755 || a.typ != 1 || a.nlink != 1 || a.size != 0 {
		t.Fatalf("CREATE: %d %+v", st, a)
	}
	w, n, verf, st := c.write(h, 3, []byte("hello"), unstable)
	if n != 5 || st != ok || !w.pre || w.size != 0 || w.post == nil || w.post.size != 8 {
		t.Fatalf("WRITE: %d %d %+v", n, st, w)
	}
	if v, st := c.commit(h); v != verf || st != ok {
		t.Fatalf("COMMIT: verifier %x, status %d; WRITE said %x", v, st, verf)
	}
	for _, stable := range []uint32{dataSync, fileSync} {
		if _, _, v, st := c.write(h, 3, []byte("hello"), stable); st != ok || v != verf {
			t.Fatalf("stable WRITE: %x %d", v, st)
		}
	}
	for _, tt := range []struct {
		off   uint64
		count uint32
		want  string
		eof   bool
	}{
		{0, 100, "\x00\x00\x00hello", true},
		{0, 8, "\x00\x00\x00hello", true},
		{0, 7, "\x00\x00\x00hell", false},
		{3, 5, "hello", true},
		{7, 0, "", false},
		{8, 10, "", true},
		{1 << 62, 10, "", true},
		{1<<64 - 1, 1<<32 - 1, "", true},
	} {
		data, eof, st := c.read(h, tt.off, tt.count)
		if string(data) != tt.want || eof != tt.eof || st != ok {
			t.Errorf("READ %d+%d: %q %v %d, want %q %v", tt.off, tt.count, data, eof, st, tt.want, tt.eof)
		}
	}

	// UNCHECKED keeps what is there: two nodes may open one log with O_CREAT.
	h2, a, st := c.create(c.root, "file", createUnchecked, set{mode: to(uint32(0o600))})
	if st != ok || !bytes.Equal(h, h2) || a.size != 8 {
		t.Errorf("second CREATE: %d %+v", st, a)
	}
	if _, a, st = c.create(c.root, "file", createUnchecked, set{size: to(uint64(0))}); st != ok || a.size != 0 {
		t.Errorf("CREATE with size 0: %d %+v", st, a)
	}
	if _, _, st = c.create(c.root, "file", createGuarded, set{}); st != errExist {
		t.Errorf("GUARDED CREATE of an existing file: %d", st)
	}
	got, err := os.Stat(filepath.Join(dir, "file"))
	if err != nil || got.Size() != 0 {
		t.Errorf("the file here: %v %v", got, err)
	}
}

func TestExclusiveCreate(t *testing.T) {
	_, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 1000, 1000)
	root := connect(t, addr, "/", 0, 0)
	if st := root.setattr(root.root, set{mode: to(uint32(0o777))}); st != ok {
		t.Fatal(st)
	}
	h, _, st := c.exclusive(c.root, "lock", 0xdeadbeefcafef00d)
	if st != ok {
		t.Fatalf("first: %d", st)
	}
	if again, _, st := c.exclusive(c.root, "lock", 0xdeadbeefcafef00d); st != ok || !bytes.Equal(h, again) {
		t.Errorf("repeated with the same verifier: %d", st)
	}
	if _, _, st := c.exclusive(c.root, "lock", 1); st != errExist {
		t.Errorf("with another verifier: %d", st)
	}
	if st := c.setattr(h, set{mode: to(uint32(0o640)), now: true}); st != ok {
		t.Errorf("SETATTR that follows: %d", st)
	}
	if a, st := c.getattr(h); st != ok || a.mode != 0o640 || a.uid != 1000 || time.Since(time.Unix(a.mtime.Sec, 0)) > time.Hour {
		t.Errorf("attributes: %d %+v", st, a)
	}
	if _, _, st := c.exclusive(c.root, "lock", 0xdeadbeefcafef00d); st != errExist {
		t.Errorf("the same verifier after use: %d", st)
	}
}

// TestExclusiveCreateCutShort: the server died between making the file and
// giving it the verifier.
func TestExclusiveCreateCutShort(t *testing.T) {
	if kept() {
		t.Skip("makes the file as its owner")
	}
	dir := t.TempDir()
	for _, name := range []string{"lock", "used"} {
		file := filepath.Join(dir, name)
		if err := unix.Mknod(file, unix.S_IFREG, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(file, 1000, 1000); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(file, &st); err != nil {
			t.Fatal(err)
		}
		// The times are those of the making; chown has moved one on.
		for st.Mtim != st.Ctim || st.Atim != st.Ctim {
			if err := unix.UtimesNanoAt(unix.AT_FDCWD, file, nil, 0); err != nil {
				t.Fatal(err)
			}
			if err := unix.Stat(file, &st); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Chmod(filepath.Join(dir, "used"), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond) // a tick of the clock that stamps files
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 1000, 1000)
	other := connect(t, addr, "/", 1001, 1001)
	if _, _, st := other.exclusive(other.root, "lock", 7); st != errExist {
		t.Errorf("by another user: %d", st)
	}
	if _, _, st := c.exclusive(c.root, "used", 8); st != errExist {
		t.Errorf("a file that was finished: %d", st)
	}
	if _, _, st := c.exclusive(c.root, "lock", 8); st != ok {
		t.Errorf("repeated: %d", st)
	}
	if _, _, st := c.exclusive(c.root, "lock", 9); st != errExist {
		t.Errorf("a second one: %d", st)
	}
	if _, _, st := c.exclusive(c.root, "lock", 8); st != ok {
		t.Errorf("repeated again: %d", st)
	}
}

func TestSpecialFiles(t *testing.T) {
	dir := t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 0, 0)
	user := connect(t, addr, "/", 1000, 1000)
	c.setattr(c.root, set{mode: to(uint32(0o1777))})
	for _, tt := range []struct {
		typ, mode uint32
		user      status // what a user without privilege gets
	}{
		{3, 0o660, errPerm},
		{4, 0o620, errPerm},
		{6, 0o755, ok},
		{7, 0o640, ok},
	} {
		name := fmt.Sprint("node", tt.typ)
		h, a, st := c.mknod(c.root, name, tt.typ, tt.mode, 259, 70000)
		if st != ok || a.typ != tt.typ || a.mode != tt.mode {
			t.Errorf("MKNOD %d: %d %+v", tt.typ, st, a)
			continue
		}
		if tt.typ < 5 && (a.major != 259 || a.minor != 70000) {
			t.Errorf("device %d has numbers %d, %d", tt.typ, a.major, a.minor)
		}
		if _, _, st := user.mknod(c.root, name+"u", tt.typ, tt.mode, 1, 3); st != tt.user {
			t.Errorf("MKNOD %d by a user: %d, want %d", tt.typ, st, tt.user)
		}
		// Attributes work without opening; data do not, and nothing waits.
		when := unix.Timespec{Sec: 1234567890, Nsec: 987654321}
		if st := c.setattr(h, set{mode: to(uint32(0o4711)), uid: to(uint32(7)), mtime: &when}); st != ok {
			t.Errorf("SETATTR of %s: %d", name, st)
		}
		if a, st := c.getattr(h); st != ok || a.uid != 7 || a.mode != 0o4711 || a.mtime != when {
			t.Errorf("GETATTR of %s: %d %+v", name, st, a)
		}
		if _, _, st := c.read(h, 0, 10); st != errInval {
			t.Errorf("READ of %s: %d", name, st)
		}
		if _, _, _, st := c.write(h, 0, []byte("x"), unstable); st != errInval {
			t.Errorf("WRITE of %s: %d", name, st)
		}
	}
	if st, _ := c.nfs(11, func(e *buffer) { e.opaque(c.root); e.str("reg"); e.u32(1) }); st != errBadType {
		t.Errorf("MKNOD of a regular file: %d", st)
	}
}

func TestSymlink(t *testing.T) {
	_, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 0, 0)
	target := "../../" + strings.Repeat("long/", 500)
	h, a, st := c.symlink(c.root, "link", target)
	if st != ok || a.typ != 5 || a.mode != 0o777 || a.size != uint64(len(target)) {
		t.Fatalf("SYMLINK: %d %+v", st, a)
	}
	st, d := c.nfs(5, func(e *buffer) { e.opaque(h) })
	if d.maybeAttrs(); st != ok || string(d.opaque(5000)) != target {
		t.Errorf("READLINK: %d", st)
	}
	if st, _ := c.nfs(5, func(e *buffer) { e.opaque(c.root) }); st != errInval {
		t.Errorf("READLINK of a directory: %d", st)
	}
	when := unix.Timespec{Sec: 1, Nsec: 2}
	if st := c.setattr(h, set{uid: to(uint32(5)), gid: to(uint32(6)), mtime: &when}); st != ok {
		t.Errorf("SETATTR of a link: %d", st)
	}
	if a, _ := c.getattr(h); a.uid != 5 || a.gid != 6 || a.mtime != when {
		t.Errorf("GETATTR of a link: %+v", a)
	}
	if st := c.link(h, c.root, "link2"); st != ok {
		t.Errorf("LINK of a symbolic link: %d", st)
	}
	if h2, st := c.lookup(c.root, "link2"); st != ok || !bytes.Equal(h, h2) {
		t.Errorf("LOOKUP of the second name: %d", st)
	}
	if _, _, st := c.symlink(c.root, "huge", strings.Repeat("x", 5000)); st != errNameTooLong {
		t.Errorf("SYMLINK with a target of 5000 bytes: %d", st)
	}
}

func TestLinkRenameRemove(t *testing.T) {
	dir := t.TempDir()
	s, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 0, 0)
	h, _, _ := c.create(c.root, "a", createGuarded, set{})
	c.write(h, 0, []byte("kept"), fileSync)
	sub, _, _ := c.mkdir(c.root, "sub", 0o755)

	if st := c.link(h, sub, "b"); st != ok {
		t.Fatalf("LINK: %d", st)
	}
	if a, _ := c.getattr(h); a.nlink != 2 {
		t.Errorf("links: %d", a.nlink)
	}
	if st := c.link(h, sub, "b"); st != errExist {
		t.Errorf("LINK onto a name: %d", st)
	}
	if st := c.link(sub, c.root, "dirlink"); st != errIsDir {
		t.Errorf("LINK of a directory: %d", st)
	}
	if st := c.remove(c.root, "a"); st != ok {
		t.Errorf("REMOVE: %d", st)
	}
	if data, _, st := c.read(h, 0, 10); string(data) != "kept" || st != ok {
		t.Errorf("READ by the other name: %q %d", data, st)
	}
	// Renaming an open file, as silly rename does, leaves its handle alone.
	if st := c.rename(sub, "b", c.root, ".nfs0001"); st != ok {
		t.Errorf("RENAME: %d", st)
	}
	if data, _, st := c.read(h, 0, 10); string(data) != "kept" || st != ok {
		t.Errorf("READ after RENAME: %q %d", data, st)
	}
	// The target of a rename is gone, and its space with it.
	old, _, _ := c.create(c.root, "target", createGuarded, set{})
	c.write(old, 0, []byte("old"), unstable)
	if st := c.rename(c.root, ".nfs0001", c.root, "target"); st != ok {
		t.Errorf("RENAME over a file: %d", st)
	}
	if _, st := c.getattr(old); st != errStale {
		t.Errorf("GETATTR of the replaced file: %d", st)
	}
	if st := c.remove(c.root, "target"); st != ok {
		t.Errorf("REMOVE: %d", st)
	}
	if _, st := c.getattr(h); st != errStale {
		t.Errorf("GETATTR of the removed file: %d", st)
	}
	if open := deleted(t, dir); len(open) != 0 {
		t.Errorf("removed files are still open: %v", open)
	}

	c.create(sub, "child", createGuarded, set{})
	for _, tt := range []struct {
		what string
		got  status
		want status
	}{
		{"RMDIR of a full directory", c.rmdir(c.root, "sub"), errNotEmpty},
		{"REMOVE of a directory", c.remove(c.root, "sub"), errIsDir},
		{"RMDIR of a file", c.rmdir(sub, "child"), errNotDir},
		{"RMDIR of .", c.rmdir(sub, "."), errInval},
		{"RMDIR of ..", c.rmdir(sub, ".."), errExist},
		{"REMOVE of nothing", c.remove(sub, "nothing"), errNoEnt},
		{"RENAME of nothing", c.rename(sub, "nothing", sub, "x"), errNoEnt},
		{"RENAME of .", c.rename(sub, ".", sub, "x"), errInval},
		{"RENAME to ..", c.rename(sub, "child", sub, ".."), errInval},
		{"RENAME of a directory into itself", c.rename(c.root, "sub", sub, "x"), errInval},
		{"RENAME in a file", c.rename(c.walk("sub", "child"), "x", sub, "x"), errNotDir},
		{"REMOVE", c.remove(sub, "child"), ok},
		{"RMDIR", c.rmdir(c.root, "sub"), ok},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %d, want %d", tt.what, tt.got, tt.want)
		}
	}
	if _, st := c.getattr(sub); st != errStale {
		t.Errorf("GETATTR of the removed directory: %d", st)
	}
	if n := s.Stats().CachedFiles; n != 1 {
		t.Errorf("%d files cached, want the root alone", n)
	}
}

// deleted lists this process's descriptors of removed files under dir.
func deleted(t *testing.T, dir string) (out []string) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		name, _ := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		if strings.HasSuffix(name, "(deleted)") && (strings.HasPrefix(name, dir) || strings.HasPrefix(name, "/target")) {
			out = append(out, name)
		}
	}
	return out
}

// TestRemovedOnHost: a file that goes away behind the server's back is not kept
// by the cache, not even when clients go on asking for it.
func TestRemovedOnHost(t *testing.T) {
	dir := t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 0, 0)
	h, _, _ := c.create(c.root, "file", createGuarded, set{})
	if err := os.Remove(filepath.Join(dir, "file")); err != nil {
		t.Fatal(err)
	}
	c.getattr(h) // may still see it
	if _, st := c.getattr(h); st != errStale {
		t.Errorf("GETATTR: %d", st)
	}
}

func TestAttributes(t *testing.T) {
	dir := t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 0, 0)
	h, before, _ := c.create(c.root, "f", createGuarded, set{mode: to(uint32(0o600))})

	at, mt := unix.Timespec{Sec: 1<<32 - 1, Nsec: 999999999}, unix.Timespec{Sec: 3, Nsec: 1}
	if st := c.setattr(h, set{mode: to(uint32(0o6755)), uid: to(uint32(10)), gid: to(uint32(20)), size: to(uint64(5 << 32)), atime: &at, mtime: &mt}); st != ok {
		t.Fatalf("SETATTR: %d", st)
	}
	a, _ := c.getattr(h)
	if a.mode != 0o6755 || a.uid != 10 || a.gid != 20 || a.size != 5<<32 || a.mtime != mt {
		t.Errorf("GETATTR: %+v", a)
	}
	if a.atime.Nsec != at.Nsec && a.atime != at {
		t.Errorf("atime: %+v", a.atime)
	}
	if a.ctime == a.mtime || a.ctime.Sec < before.ctime.Sec {
		t.Errorf("ctime is not the kernel's: %+v", a.ctime)
	}
	if a.used > 1<<20 {
		t.Errorf("a sparse file uses %d bytes", a.used)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "f"), &st); err != nil || st.Ino != a.fileid || st.Ctim != a.ctime {
		t.Errorf("the file here: %+v %v", st, err)
	}
	// Beyond 4 GiB.
	if _, n, _, st := c.write(h, 5<<32, []byte("far"), unstable); n != 3 || st != ok {
		t.Errorf("WRITE at 20 GiB: %d %d", n, st)
	}
	if data, eof, st := c.read(h, 5<<32-1, 100); string(data) != "\x00far" || !eof || st != ok {
		t.Errorf("READ at 20 GiB: %q %v %d", data, eof, st)
	}

	guard := func(ctime unix.Timespec) status {
		st, _ := c.nfs(2, func(e *buffer) {
			e.opaque(h)
			set{mode: to(uint32(0o644))}.encode(e)
			e.boolean(true)
			e.u32(uint32(ctime.Sec))
			e.u32(uint32(ctime.Nsec))
		})
		return st
	}
	if st := guard(unix.Timespec{Sec: 1}); st != errNotSync {
		t.Errorf("SETATTR with a wrong guard: %d", st)
	}
	a, _ = c.getattr(h)
	if st := guard(a.ctime); st != ok {
		t.Errorf("SETATTR with the right guard: %d", st)
	}
	for _, tt := range []struct {
		what string
		got  status
		want status
	}{
		{"size of a directory", c.setattr(c.root, set{size: to(uint64(0))}), errIsDir},
		{"size beyond all bounds", c.setattr(h, set{size: to(uint64(1 << 63))}), errFBig},
		{"size beyond the file system's", c.setattr(h, set{size: to(uint64(1<<63 - 1))}), errFBig},
		{"nanoseconds", c.setattr(h, set{mtime: &unix.Timespec{Nsec: 1e9}}), errInval},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %d, want %d", tt.what, tt.got, tt.want)
		}
	}
	if _, _, _, st := c.write(h, 1<<63-2, []byte("x"), unstable); st != errFBig {
		t.Errorf("WRITE at the end of all files: %d", st)
	}
}

func TestFileSystem(t *testing.T) {
	_, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 1000, 1000)
	st, d := c.nfs(18, func(e *buffer) { e.opaque(c.root) })
	if a := d.maybeAttrs(); st != ok || a == nil {
		t.Fatalf("FSSTAT: %d", st)
	}
	total, free, avail := d.u64(), d.u64(), d.u64()
	if total == 0 || free > total || avail > free {
		t.Errorf("FSSTAT: %d %d %d", total, free, avail)
	}
	st, d = c.nfs(19, func(e *buffer) { e.opaque(c.root) })
	d.maybeAttrs()
	if rt := d.u32(); st != ok || rt != 1<<20 {
		t.Errorf("FSINFO: %d, rtmax %d", st, rt)
	}
	st, d = c.nfs(20, func(e *buffer) { e.opaque(c.root) })
	d.maybeAttrs()
	if links, name := d.u32(), d.u32(); st != ok || links < 1000 || name != 255 {
		t.Errorf("PATHCONF: %d, linkmax %d, name_max %d", st, links, name)
	}
}

func TestMount(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	os.MkdirAll(filepath.Join(a, "x/y"), 0o755)
	os.WriteFile(filepath.Join(a, "x/file"), nil, 0o644)
	os.Symlink("/", filepath.Join(a, "x/link"))
	_, addr, _ := serve(t, Export{Path: "/", Dir: a}, Export{Path: "/home", Dir: b, ReadOnly: true})
	c := dial(t, addr, 0, 0)
	for _, tt := range []struct {
		path string
		want status
	}{
		{"/", ok}, {"/x", ok}, {"/x//y/", ok}, {"/home", ok},
		{"/nothing", errNoEnt}, {"/home/x", errNoEnt}, {"x", errNoEnt}, {"", errNoEnt}, {"/\x00", errNoEnt},
		{"/x/file", errNotDir}, {"/x/link", errNotDir}, {"/x/link/etc", errNotDir},
		{"/..", errAcces}, {"/x/../..", errAcces}, {"/" + strings.Repeat("a", 256), errNameTooLong},
	} {
		if _, st := c.mount(tt.path); st != tt.want {
			t.Errorf("MNT %q: %d, want %d", tt.path, st, tt.want)
		}
	}
	root, _ := c.mount("/")
	home, _ := c.mount("/home")
	ra, _ := c.getattr(root)
	ha, _ := c.getattr(home)
	if ra.fsid == ha.fsid {
		t.Error("two exports have one fsid")
	}
	if st := c.rename(root, "x", home, "x"); st != errXDev {
		t.Errorf("RENAME between exports: %d", st)
	}
	if st := c.link(c.lookupMust(c.lookupMust(root, "x"), "file"), home, "x"); st != errXDev {
		t.Errorf("LINK between exports: %d", st)
	}
	// EXPORT, DUMP, UMNT, UMNTALL.
	acc, d := c.call(progMount, 3, 5, nil)
	var paths []string
	for d.boolean() {
		paths = append(paths, string(d.opaque(1024)))
		d.boolean()
	}
	if acc != acceptSuccess || d.bad || strings.Join(paths, " ") != "/home /" {
		t.Errorf("EXPORT: %d %v", acc, paths)
	}
	if acc, d := c.call(progMount, 3, 2, nil); acc != acceptSuccess || d.boolean() {
		t.Errorf("DUMP: %d", acc)
	}
	e := &buffer{}
	e.str("/")
	if acc, d := c.call(progMount, 3, 3, e.b); acc != acceptSuccess || len(d.b) != 0 {
		t.Errorf("UMNT: %d", acc)
	}
	if acc, d := c.call(progMount, 3, 4, nil); acc != acceptSuccess || len(d.b) != 0 {
		t.Errorf("UMNTALL: %d", acc)
	}
}

func (c *client) lookupMust(dir []byte, name string) []byte {
	c.t.Helper()
	h, st := c.lookup(dir, name)
	if st != ok {
		c.t.Fatalf("LOOKUP %s: %d", name, st)
	}
	return h
}

// TestRestart: handles of open, renamed and unlinked-elsewhere files outlive
// the server, and the write verifier tells of the restart.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	_, addr, stop := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 0, 0)
	sub, _, _ := c.mkdir(c.root, "sub", 0o755)
	h, _, _ := c.create(sub, "file", createGuarded, set{})
	_, _, verf, _ := c.write(h, 0, []byte("before"), unstable)
	rootAttr, _ := c.getattr(c.root)
	stop()
	if err := os.Rename(filepath.Join(dir, "sub/file"), filepath.Join(dir, "moved")); err != nil {
		t.Fatal(err)
	}

	_, addr, _ = serve(t, Export{Path: "/", Dir: dir})
	n := dial(t, addr, 0, 0)
	if a, st := n.getattr(c.root); st != ok || a.fileid != rootAttr.fileid || a.fsid != rootAttr.fsid {
		t.Errorf("root after the restart: %d %+v, before %+v", st, a, rootAttr)
	}
	if data, _, st := n.read(h, 0, 10); string(data) != "before" || st != ok {
		t.Errorf("READ after the restart: %q %d", data, st)
	}
	if v, st := n.commit(h); st != ok || v == verf {
		t.Errorf("COMMIT after the restart: %d, verifier %x (before %x)", st, v, verf)
	}
	n.root = c.root
	if got := n.walk("moved"); !bytes.Equal(got, h) {
		t.Error("the file has another handle after the restart")
	}
	if !bytes.Equal(n.walk("sub"), sub) {
		t.Error("the directory has another handle after the restart")
	}
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "file"), []byte("data"), 0o666)
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir, ReadOnly: true})
	c := connect(t, addr, "/", 0, 0)
	h := c.walk("file")
	if data, _, st := c.read(h, 0, 10); string(data) != "data" || st != ok {
		t.Errorf("READ: %q %d", data, st)
	}
	if got := c.access(h, 0x3f); got != accessRead {
		t.Errorf("ACCESS: %#x", got)
	}
	_, _, create := c.create(c.root, "new", createUnchecked, set{})
	_, _, _, write := c.write(h, 0, []byte("x"), unstable)
	_, _, mkdir := c.mkdir(c.root, "d", 0o755)
	for what, st := range map[string]status{
		"CREATE": create, "WRITE": write, "MKDIR": mkdir, "REMOVE": c.remove(c.root, "file"),
		"SETATTR": c.setattr(h, set{mode: to(uint32(0))}), "size": c.setattr(h, set{size: to(uint64(0))}),
		"RENAME": c.rename(c.root, "file", c.root, "y"), "LINK": c.link(h, c.root, "l"),
	} {
		if st != errROFS {
			t.Errorf("%s: %d", what, st)
		}
	}
}

func TestNew(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	os.WriteFile(file, nil, 0o644)
	for _, tt := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"no export", Config{HandleKey: testKey}, "no export"},
		{"short key", Config{Exports: []Export{{Path: "/", Dir: dir, Kept: kept()}}, HandleKey: []byte("short")}, "5 bytes"},
		{"relative path", Config{Exports: []Export{{Path: "x", Dir: dir, Kept: kept()}}, HandleKey: testKey}, "absolute"},
		{"unclean path", Config{Exports: []Export{{Path: "/x/", Dir: dir, Kept: kept()}}, HandleKey: testKey}, "absolute"},
		{"twice", Config{Exports: []Export{testExport(t, dir), testExport(t, dir)}, HandleKey: testKey}, "twice"},
		{"missing", Config{Exports: []Export{{Path: "/", Dir: dir + "/none", Kept: kept()}}, HandleKey: testKey}, "no such file"},
		{"a file", Config{Exports: []Export{{Path: "/", Dir: file, Kept: kept()}}, HandleKey: testKey}, "not a directory"},
		{"no handles", Config{Exports: []Export{{Path: "/", Dir: "/proc/self"}}, HandleKey: testKey}, "no file handles"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name == "no handles" {
				needRoot(t)
			}
			s, err := New(tt.cfg)
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want something with %q", err, tt.want)
			}
		})
	}
}

func TestLoadKey(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	key, err := LoadKey(file)
	if err != nil || len(key) != 32 {
		t.Fatalf("%d bytes, %v", len(key), err)
	}
	if again, err := LoadKey(file); err != nil || !bytes.Equal(key, again) {
		t.Errorf("another key on the second reading (%v)", err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	os.WriteFile(file, []byte("cut"), 0o600)
	if _, err := LoadKey(file); err == nil {
		t.Error("a cut key was taken")
	}
	if _, err := LoadKey(filepath.Join(file, "x")); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
