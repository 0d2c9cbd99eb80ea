package nfs

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/meta"
)

// tree makes files with owner and mode; a name ending in / is a directory.
func tree(t *testing.T, dir string, files ...struct {
	name     string
	uid, gid int
	mode     uint32
}) {
	t.Helper()
	for _, f := range files {
		p := filepath.Join(dir, f.name)
		if f.name == "" || strings.HasSuffix(f.name, "/") {
			if err := os.MkdirAll(p, 0o700); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(p, []byte("data"), 0o600); err != nil {
			t.Fatal(err)
		}
		if kept() {
			var st unix.Stat_t
			if err := unix.Stat(p, &st); err != nil {
				t.Fatal(err)
			}
			a := meta.Attr{Mode: st.Mode&unix.S_IFMT | f.mode, UID: uint32(f.uid), GID: uint32(f.gid)}
			if err := meta.WritePath(p, &st, a); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.Chown(p, f.uid, f.gid); err != nil {
			t.Fatal(err)
		}
		if err := unix.Chmod(p, f.mode); err != nil {
			t.Fatal(err)
		}
	}
}

type entry = struct {
	name     string
	uid, gid int
	mode     uint32
}

func TestPermissions(t *testing.T) {
	old := unix.Umask(0o077) // for the server, which reads it at its start
	defer unix.Umask(old)
	dir := t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	tree(t, dir,
		entry{"", 0, 0, 0o755},
		entry{"secret", 0, 0, 0o600},
		entry{"public", 0, 0, 0o644},
		entry{"group", 0, 50, 0o660},
		entry{"own", 1000, 1000, 0o600},
		entry{"ownlocked", 1000, 1000, 0o000},
		entry{"notowner", 1000, 50, 0o044}, // the owner's bits count, not the group's
		entry{"prog", 0, 0, 0o711},
		entry{"rootdir/", 0, 0, 0o700},
		entry{"rootdir/inner", 0, 0, 0o666},
		entry{"listonly/", 0, 0, 0o744},
		entry{"listonly/x", 0, 0, 0o644},
		entry{"tmp/", 0, 0, 0o1777},
		entry{"tmp/roots", 0, 0, 0o666},
		entry{"setgid/", 0, 50, 0o2777},
		entry{"write/", 1000, 1000, 0o755},
	)
	root := connect(t, addr, "/", 0, 0)
	user := connect(t, addr, "/", 1000, 1000)
	member := connect(t, addr, "/", 1001, 1001, 7, 50)
	anyone := dial(t, addr, 0, 0)
	anyone.root = root.root

	const all = 0x3f
	dirAll := uint32(accessRead | accessLookup | accessModify | accessExtend | accessDelete)
	fileRW := uint32(accessRead | accessModify | accessExtend)
	for _, tt := range []struct {
		name               string
		root, user, member uint32
	}{
		{"secret", fileRW, 0, 0},
		{"public", fileRW, accessRead, accessRead},
		{"group", fileRW, 0, fileRW},
		{"own", fileRW, fileRW, 0},
		{"ownlocked", fileRW, 0, 0},
		{"notowner", fileRW, 0, accessRead},
		{"prog", fileRW | accessExecute, accessExecute, accessExecute},
		{"rootdir", dirAll, 0, 0},
		{"listonly", dirAll, accessRead, accessRead},
		{"tmp", dirAll, dirAll, dirAll},
	} {
		h := root.walk(tt.name)
		for _, who := range []struct {
			name string
			c    *client
			want uint32
		}{{"root", root, tt.root}, {"user", user, tt.user}, {"member", member, tt.member}} {
			if got := who.c.access(h, all); got != who.want {
				t.Errorf("ACCESS of %s as %s: %#x, want %#x", tt.name, who.name, got, who.want)
			}
			_, _, read := who.c.read(h, 0, 1)
			may := who.want&(accessRead|accessExecute) != 0 || who.name == "user" && (strings.HasPrefix(tt.name, "own") || tt.name == "notowner")
			if strings.HasSuffix(tt.name, "dir") || tt.name == "tmp" || tt.name == "listonly" {
				continue
			}
			if (read == ok) != may || read != ok && read != errAcces {
				t.Errorf("READ of %s as %s: %d", tt.name, who.name, read)
			}
		}
	}

	// Owner override: what is open stays usable for the owner, whatever the mode.
	if _, _, _, st := user.write(user.walk("ownlocked"), 0, []byte("mine"), unstable); st != ok {
		t.Errorf("WRITE by the owner of a mode 0 file: %d", st)
	}
	if st := user.setattr(user.walk("ownlocked"), set{size: to(uint64(1))}); st != ok {
		t.Errorf("truncation by the owner of a mode 0 file: %d", st)
	}
	secret := root.walk("secret")
	_, _, _, write := user.write(secret, 0, []byte("x"), unstable)
	_, _, _, groupWrite := member.write(member.walk("group"), 0, []byte("x"), unstable)
	_, lookup := user.lookup(root.walk("rootdir"), "inner")
	_, noSearch := user.lookup(root.walk("listonly"), "x")
	_, _, mk := user.create(user.root, "new", createUnchecked, set{})
	_, _, opened := user.create(user.root, "secret", createUnchecked, set{})
	_, _, trunc := user.create(user.root, "secret", createUnchecked, set{size: to(uint64(0))})
	_, _, listing := user.list(root.walk("rootdir"), 0, 4096, true)
	for _, tt := range []struct {
		what      string
		got, want status
	}{
		{"WRITE to another's file", write, errAcces},
		{"WRITE by a group member", groupWrite, ok},
		{"truncation with server time by a group member", member.setattr(member.walk("group"), set{size: to(uint64(0))}), ok},
		{"LOOKUP in a closed directory", lookup, errAcces},
		{"LOOKUP in a directory that may only be listed", noSearch, errAcces},
		{"READDIR of a closed directory", listing, errAcces},
		{"CREATE in root's directory", mk, errAcces},
		{"CREATE of a file that is there", opened, ok},
		{"CREATE that truncates another's file", trunc, errAcces},
		{"REMOVE in root's directory", user.remove(user.root, "public"), errAcces},
		{"REMOVE in a sticky directory", user.remove(root.walk("tmp"), "roots"), errPerm},
		{"RENAME in a sticky directory", user.rename(root.walk("tmp"), "roots", root.walk("tmp"), "y"), errPerm},
		{"SETATTR of another's mode", user.setattr(root.walk("public"), set{mode: to(uint32(0o777))}), errPerm},
		{"SETATTR of another's times", user.setattr(root.walk("public"), set{mtime: &unix.Timespec{}}), errPerm},
		{"giving a file away", user.setattr(user.walk("own"), set{uid: to(uint32(0))}), errPerm},
		{"a group one is not in", user.setattr(user.walk("own"), set{gid: to(uint32(0))}), errPerm},
		{"SETATTR of the own mode", user.setattr(user.walk("own"), set{mode: to(uint32(0o4755))}), ok},
		{"touching a file one may write", member.setattr(member.walk("group"), set{now: true}), ok},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %d, want %d", tt.what, tt.got, tt.want)
		}
	}
	if data, _ := os.ReadFile(filepath.Join(dir, "secret")); string(data) != "data" {
		t.Errorf("the secret is now %q", data)
	}

	// Who owns what is made, with the mode as sent: the server's umask (077 here)
	// plays no part.
	_, a, st := user.create(root.walk("tmp"), "users", createGuarded, set{mode: to(uint32(0o666))})
	if st != ok || a.uid != 1000 || a.gid != 1000 || a.mode != 0o666 {
		t.Errorf("CREATE: %d %+v", st, a)
	}
	_, a, st = root.mkdir(root.walk("tmp"), "roots2", 0o777)
	if st != ok || a.uid != 0 || a.mode != 0o777 {
		t.Errorf("MKDIR by root: %d %+v", st, a)
	}
	_, a, st = user.mkdir(root.walk("setgid"), "d", 0o750)
	if st != ok || a.gid != 50 || a.mode != 0o2750 {
		t.Errorf("MKDIR in a set-gid directory: %d %+v", st, a)
	}
	// A user's write takes the set-id bits away, root's does not.
	suid := user.walk("own")
	root.write(suid, 0, []byte("x"), unstable)
	if a, _ := root.getattr(suid); a.mode != 0o4755 {
		t.Errorf("mode after root's write: %o", a.mode)
	}
	user.write(suid, 0, []byte("x"), unstable)
	if a, _ := root.getattr(suid); a.mode != 0o755 {
		t.Errorf("mode after the user's write: %o", a.mode)
	}

	// Without credentials one is nobody.
	_, _, st = anyoneRead(anyone, secret)
	if st != errAcces {
		t.Errorf("READ without credentials: %d", st)
	}
}

// anyoneRead is a READ with AUTH_NONE.
func anyoneRead(c *client, h []byte) ([]byte, bool, status) {
	c.t.Helper()
	c.xid++
	e := &buffer{b: make([]byte, 4)}
	for _, v := range []uint32{c.xid, msgCall, rpcVersion, progNFS, 3, procRead, flavorNone, 0, flavorNone, 0} {
		e.u32(v)
	}
	e.opaque(h)
	e.u64(0)
	e.u32(10)
	finish(e.b)
	c.nc.Write(e.b)
	_, d := c.accepted(c.reply())
	return nil, false, status(d.u32())
}

func TestRootSquash(t *testing.T) {
	dir := t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir, RootSquash: true})
	tree(t, dir, entry{"", 0, 0, 0o1777}, entry{"secret", 0, 0, 0o640})
	c := connect(t, addr, "/", 0, 0, 0, 4)
	h := c.walk("secret")
	if _, _, st := c.read(h, 0, 1); st != errAcces {
		t.Errorf("READ: %d", st)
	}
	if st := c.setattr(h, set{mode: to(uint32(0o666))}); st != errPerm {
		t.Errorf("SETATTR: %d", st)
	}
	if _, a, st := c.create(c.root, "new", createGuarded, set{}); st != ok || a.uid != nobody || a.gid != nobody {
		t.Errorf("CREATE: %d %+v", st, a)
	}
}

// TestACL: where a file has a POSIX ACL, the mode alone would lie.
func TestACL(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	tree(t, dir, entry{"", 0, 0, 0o755}, entry{"f", 0, 0, 0o640})
	// struct posix_acl_xattr_header and entries (linux/posix_acl_xattr.h): tag,
	// permissions, id; user::rw-, user:1000:r--, user:1001:---, group::r--,
	// mask::r--, other::r--.
	acl := binary.LittleEndian.AppendUint32(nil, 2)
	for _, a := range [][3]uint32{{0x01, 6, 1<<32 - 1}, {0x02, 4, 1000}, {0x02, 0, 1001}, {0x04, 4, 1<<32 - 1}, {0x10, 4, 1<<32 - 1}, {0x20, 4, 1<<32 - 1}} {
		acl = binary.LittleEndian.AppendUint16(acl, uint16(a[0]))
		acl = binary.LittleEndian.AppendUint16(acl, uint16(a[1]))
		acl = binary.LittleEndian.AppendUint32(acl, a[2])
	}
	if err := unix.Setxattr(filepath.Join(dir, "f"), "system.posix_acl_access", acl, 0); err != nil {
		t.Skipf("needs a file system with POSIX ACLs: %v", err)
	}
	user, other := connect(t, addr, "/", 1000, 1000), connect(t, addr, "/", 1001, 0)
	h := user.walk("f")
	if got := user.access(h, 0x3f); got != accessRead {
		t.Errorf("ACCESS of the named user: %#x", got)
	}
	if got := other.access(h, 0x3f); got != 0 {
		t.Errorf("ACCESS of the excluded user: %#x", got)
	}
	if _, _, st := user.read(h, 0, 1); st != ok {
		t.Errorf("READ of the named user: %d", st)
	}
	if _, _, st := other.read(h, 0, 1); st != errAcces {
		t.Errorf("READ of the excluded user: %d", st)
	}
}

func TestEscape(t *testing.T) {
	outer := t.TempDir()
	dir := filepath.Join(outer, "export")
	os.MkdirAll(filepath.Join(dir, "sub/deep"), 0o755)
	os.WriteFile(filepath.Join(outer, "outside"), []byte("secret"), 0o644)
	os.Symlink("/etc", filepath.Join(dir, "etc"))
	s, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 0, 0)
	sub := c.walk("sub")

	for name, want := range map[string]status{
		"": errAcces, "/": errAcces, "sub/deep": errAcces, "../outside": errAcces, "/etc/passwd": errAcces,
		"sub\x00": errAcces, strings.Repeat("x", 256): errNameTooLong, strings.Repeat("x", 70000): errNameTooLong,
		"nothing": errNoEnt, strings.Repeat("x", 255): errNoEnt,
	} {
		if _, st := c.lookup(c.root, name); st != want {
			t.Errorf("LOOKUP %.20q: %d, want %d", name, st, want)
		}
		if len(name) == 255 || name == "nothing" {
			continue
		}
		if _, _, st := c.create(c.root, name, createUnchecked, set{}); st != want {
			t.Errorf("CREATE %.20q: %d, want %d", name, st, want)
		}
		if st := c.rename(c.root, "sub", c.root, name); st != want {
			t.Errorf("RENAME to %.20q: %d, want %d", name, st, want)
		}
		if st := c.remove(c.root, name); st != want {
			t.Errorf("REMOVE %.20q: %d, want %d", name, st, want)
		}
	}
	// The root is its own parent.
	if h, st := c.lookup(c.root, ".."); st != ok || !bytes.Equal(h, c.root) {
		t.Errorf("LOOKUP .. of the root: %d", st)
	}
	if h, st := c.lookup(sub, ".."); st != ok || !bytes.Equal(h, c.root) {
		t.Errorf("LOOKUP .. of a directory: %d", st)
	}
	rootAttr, _ := c.getattr(c.root)
	for _, plus := range []bool{false, true} {
		for _, l := range c.listAll(c.root, 4096, plus) {
			if l.name == ".." && l.fileid != rootAttr.fileid {
				t.Errorf("the root's .. shows file id %d (plus %v)", l.fileid, plus)
			}
		}
	}
	// A directory moved out of the export leads no further up.
	if err := os.Rename(filepath.Join(dir, "sub/deep"), filepath.Join(outer, "deep")); err != nil {
		t.Fatal(err)
	}
	os.Rename(filepath.Join(outer, "deep"), filepath.Join(dir, "sub/deep"))
	deep := c.walk("sub", "deep")
	os.Rename(filepath.Join(dir, "sub/deep"), filepath.Join(outer, "deep"))
	if _, st := c.lookup(deep, ".."); st == ok {
		t.Error("LOOKUP .. of a directory that was moved out succeeds")
	}
	// Symbolic links are the client's to follow.
	link := c.walk("etc")
	if _, st := c.lookup(link, "passwd"); st != errNotDir {
		t.Errorf("LOOKUP through a link: %d", st)
	}
	if _, _, st := c.create(link, "x", createUnchecked, set{}); st != errNotDir {
		t.Errorf("CREATE through a link: %d", st)
	}
	if _, a, st := c.create(c.root, "etc", createUnchecked, set{size: to(uint64(0))}); st != ok || a.typ != 5 {
		t.Errorf("CREATE onto a link: %d %+v", st, a)
	}

	// Forged handles: any bit, any length; another key; a file outside with the
	// right format but no right MAC; a MAC for another export.
	h, err := handleAt(unix.AT_FDCWD, filepath.Join(outer, "outside"))
	if err != nil {
		t.Fatal(err)
	}
	x := s.exports[0]
	strange := &Server{key: []byte("another key, also long enough")}
	elsewhere := &export{id: x.id + 1}
	forged := [][]byte{
		nil, {}, {1}, bytes.Repeat([]byte{0xff}, 64), make([]byte, 64),
		sub[:len(sub)-1], append(bytes.Clone(sub), 0),
		strange.seal(x, kindReg, h), s.seal(elsewhere, kindReg, h),
	}
	for i := range sub {
		f := bytes.Clone(sub)
		f[i] ^= 0x10
		forged = append(forged, f)
	}
	for _, f := range forged {
		if _, st := c.getattr(f); st != errStale && st != errBadHandle {
			t.Errorf("handle % x: %d", f, st)
		}
	}
	// Handles that were cached are checked as strictly.
	if _, st := c.getattr(sub); st != ok {
		t.Fatal(st)
	}
	if n := s.Stats().BadHandles; n != uint64(len(forged)) {
		t.Errorf("%d bad handles counted, want %d", n, len(forged))
	}
}

// TestMountsBelow: what the host mounts into the tree is not part of it.
func TestMountsBelow(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "mnt"), 0o755)
	os.WriteFile(filepath.Join(dir, "mnt/below"), nil, 0o644)
	mount := func() {
		if err := unix.Mount("tmpfs", filepath.Join(dir, "mnt"), "tmpfs", 0, ""); err != nil {
			t.Skipf("needs mount(2): %v", err)
		}
		t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "mnt"), unix.MNT_DETACH) })
	}
	mount()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	mount()
	c := connect(t, addr, "/", 0, 0)
	c.walk("mnt", "below")
}

// TestDevices: a device node on the tree is data; the server never opens it.
func TestDevices(t *testing.T) {
	dir := t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/", Dir: dir})
	c := connect(t, addr, "/", 0, 0)
	h, _, st := c.mknod(c.root, "zero", 4, 0o666, 1, 5)
	if st != ok {
		t.Fatal(st)
	}
	if _, _, st := c.read(h, 0, 10); st != errInval {
		t.Errorf("READ: %d", st)
	}
	if st := c.setattr(h, set{size: to(uint64(0))}); st != errInval {
		t.Errorf("truncation: %d", st)
	}
	if _, a, st := c.create(c.root, "zero", createUnchecked, set{size: to(uint64(0))}); st != ok || a.typ != 4 {
		t.Errorf("CREATE: %d %+v", st, a)
	}
}
