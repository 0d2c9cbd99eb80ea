package nfs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/meta"
)

// TestWithoutPrivilege runs every test again as an ordinary user, whose server
// can't lean on root.
func TestWithoutPrivilege(t *testing.T) {
	if kept() {
		t.Skip("this is the ordinary user's process: every test is one without privilege")
	}
	tmp, err := os.MkdirTemp("", "krgimage-nfs-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	if err := os.Chown(tmp, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	// By this name the program can be run from a directory that is closed to
	// the user.
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.v", "-test.timeout=8m")
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("as an ordinary user: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// TestBackEndsAgree does the same things, picked at random, to an export that
// the kernel judges and to one that this package judges, as root and as users:
// every answer and every attribute must be the same.
func TestBackEndsAgree(t *testing.T) {
	needRoot(t)
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { agree(t, rand.New(rand.NewPCG(seed, 0))) })
	}
}

func agree(t *testing.T, rnd *rand.Rand) {
	kernelDir, keptDir := t.TempDir(), t.TempDir()
	_, addr, _ := serve(t, Export{Path: "/kernel", Dir: kernelDir}, Export{Path: "/kept", Dir: keptDir, Kept: true})
	type who struct{ kernel, kept *client }
	var callers []who
	for _, id := range [][]uint32{{0, 0}, {0, 7}, {1000, 1000}, {1000, 1000, 50}, {1001, 1001, 50, 7}, {1002, 50}} {
		callers = append(callers, who{connect(t, addr, "/kernel", id[0], id[1], id[2:]...), connect(t, addr, "/kept", id[0], id[1], id[2:]...)})
	}
	names := []string{"a", "b", "c", "d", "e"}
	name := func() string { return names[rnd.IntN(len(names))] }
	modes := []uint32{0o000, 0o600, 0o644, 0o755, 0o777, 0o070, 0o707, 0o4755, 0o2755, 0o2745, 0o6777, 0o1777, 0o2775, 0o500, 0o3770}
	mode := func() uint32 { return modes[rnd.IntN(len(modes))] }
	id := func() uint32 { return []uint32{0, 7, 50, 1000, 1001, 1002}[rnd.IntN(6)] }
	// A handle of each side, found by the same walk as root.
	file := func() (k, u []byte, path string) {
		k, u = callers[0].kernel.root, callers[0].kept.root
		for range rnd.IntN(4) {
			n := name()
			k2, st1 := callers[0].kernel.lookup(k, n)
			u2, st2 := callers[0].kept.lookup(u, n)
			if st1 != st2 {
				t.Fatalf("LOOKUP of %s in %s as root: %d, kept %d", n, path, st1, st2)
			}
			if st1 != ok {
				break
			}
			k, u, path = k2, u2, path+"/"+n
		}
		return k, u, path
	}
	same := func(a, b attrs) bool {
		return a.typ == b.typ && a.mode == b.mode && a.uid == b.uid && a.gid == b.gid && a.nlink == b.nlink &&
			(a.typ == 2 || a.size == b.size) && a.major == b.major && a.minor == b.minor
	}
	callers[0].kernel.setattr(callers[0].kernel.root, set{mode: to(uint32(0o777))})
	callers[0].kept.setattr(callers[0].kept.root, set{mode: to(uint32(0o777))})
	for range 300 {
		c := callers[rnd.IntN(len(callers))]
		k, u, path := file()
		k2, u2, path2 := file()
		n, n2, m := name(), name(), mode()
		var s set
		for _, p := range []**uint32{&s.uid, &s.gid} {
			if rnd.IntN(3) == 0 {
				*p = to(id())
			}
		}
		if rnd.IntN(2) == 0 {
			s.mode = to(m)
		}
		switch rnd.IntN(6) {
		case 0:
			s.size = to(uint64(rnd.IntN(10)))
		case 1:
			s.now = true
		case 2:
			s.mtime = &unix.Timespec{Sec: 77}
		}
		op := rnd.IntN(13)
		do := func(c *client, h, h2 []byte) (status, attrs, uint32) {
			var a attrs
			var st status
			switch op {
			case 0, 1:
				_, a, st = c.create(h, n, createGuarded, s)
			case 2:
				_, a, st = c.mkdir(h, n, m)
			case 3:
				_, a, st = c.symlink(h, n, "target")
			case 4:
				_, a, st = c.mknod(h, n, []uint32{3, 4, 6, 7}[m%4], m, 5, 6)
			case 5:
				st = c.remove(h, n)
			case 6:
				st = c.rmdir(h, n)
			case 7, 8:
				st = c.rename(h, n, h2, n2)
			case 9:
				st = c.link(h, h2, n)
			case 10:
				st = c.setattr(h, s)
			case 11:
				_, _, _, st = c.write(h, 0, []byte("data"), unstable)
			case 12:
				_, a, st = c.create(h, n, createUnchecked, set{size: to(uint64(0))})
			}
			return st, a, c.access(h, 0x3f)
		}
		st1, a1, may1 := do(c.kernel, k, k2)
		st2, a2, may2 := do(c.kept, u, u2)
		now1, _ := callers[0].kernel.getattr(k)
		now2, _ := callers[0].kept.getattr(u)
		if st1 != st2 || may1 != may2 || !same(a1, a2) || !same(now1, now2) {
			t.Fatalf("operation %d as %d:%d on %q %s, %q %s with mode %o and %+v:\nkernel: status %d, access %#x, %+v\n        then %+v\nkept:   status %d, access %#x, %+v\n        then %+v",
				op, c.kernel.id.uid, c.kernel.id.gid, path, n, path2, n2, m, s, st1, may1, a1, now1, st2, may2, a2, now2)
		}
	}
}

// treeServer serves a kept directory, whoever runs the test.
func treeServer(t *testing.T, dir string) (s *Server, c *client, stop func()) {
	s, addr, stop := serve(t, Export{Path: "/", Dir: dir, Kept: true})
	return s, connect(t, addr, "/", 0, 0), stop
}

// TestTreeOnDisk: what lies on disk is the user's, closed to others, and needs
// no privilege to be made.
func TestTreeOnDisk(t *testing.T) {
	dir := t.TempDir()
	_, c, _ := treeServer(t, dir)
	h, _, _ := c.create(c.root, "suid", createGuarded, set{})
	c.setattr(h, set{mode: to(uint32(0o6755)), uid: to(uint32(12)), gid: to(uint32(13))})
	c.mkdir(c.root, "dir", 0o1777)
	c.symlink(c.root, "link", "/etc/passwd")
	c.mknod(c.root, "null", 4, 0o666, 1, 3)
	c.mknod(c.root, "fifo", 7, 0o600, 0, 0)
	for name, want := range map[string]struct {
		disk os.FileMode
		attr string
		text string
	}{
		"suid": {0o600, "1 106755 12 13", ""},
		"dir":  {os.ModeDir | 0o700, "1 41777 0 0", ""},
		"link": {0o600, "1 120777 0 0", "/etc/passwd"},
		"null": {0o600, "1 20666 0 0 1 3", ""},
		"fifo": {0o600, "1 10600 0 0", ""},
	} {
		path := filepath.Join(dir, name)
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != want.disk || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Getuid()) {
			t.Errorf("%s on disk: %v %v", name, info.Mode(), err)
		}
		buf := make([]byte, 100)
		if n, err := unix.Getxattr(path, meta.Name, buf); err != nil || string(buf[:n]) != want.attr {
			t.Errorf("%s has the attribute %q (%v), want %q", name, buf[:max(n, 0)], err, want.attr)
		}
		if text, _ := os.ReadFile(path); string(text) != want.text {
			t.Errorf("%s contains %q", name, text)
		}
	}
}

// TestTreeHandles: handles outlive the server and what happens to names, also
// those of hard links and of files in directories that were moved.
func TestTreeHandles(t *testing.T) {
	dir := t.TempDir()
	s, c, stop := treeServer(t, dir)
	a, _, _ := c.mkdir(c.root, "a", 0o755)
	b, _, _ := c.mkdir(a, "b", 0o755)
	f, _, _ := c.create(b, "f", createGuarded, set{})
	c.write(f, 0, []byte("f"), unstable)
	hard, _, _ := c.create(c.root, "hard", createGuarded, set{})
	c.write(hard, 0, []byte("hard"), unstable)
	c.link(hard, b, "hard2")
	gone, _, _ := c.create(b, "gone", createGuarded, set{})
	check := func(when string) {
		t.Helper()
		s.files.evictIdle()
		for want, h := range map[string][]byte{"f": f, "hard": hard} {
			if data, _, st := c.read(h, 0, 10); string(data) != want || st != ok {
				t.Errorf("%s, READ of %s: %q %d", when, want, data, st)
			}
		}
		if _, st := c.getattr(b); st != ok {
			t.Errorf("%s, GETATTR of the directory: %d", when, st)
		}
	}
	check("at first")
	if st := c.remove(b, "gone"); st != ok {
		t.Fatal(st)
	}
	s.files.evictIdle()
	if _, st := c.getattr(gone); st != errStale {
		t.Errorf("GETATTR of a removed file: %d", st)
	}
	// By a client.
	c.rename(c.root, "a", c.root, "moved")
	check("after a directory was renamed")
	if st := c.remove(c.root, "hard"); st != ok {
		t.Fatal(st)
	}
	check("after one of two names went")
	// On this machine, with the server running and at rest.
	if err := os.Rename(filepath.Join(dir, "moved"), filepath.Join(dir, "moved2")); err != nil {
		t.Fatal(err)
	}
	s.exports[0].tree.mu.Lock()
	s.exports[0].tree.walked = walk{} // long ago
	s.exports[0].tree.mu.Unlock()
	check("after a directory was renamed on disk")
	root := c.root
	stop()
	if err := os.Rename(filepath.Join(dir, "moved2/b"), filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	s, c, _ = treeServer(t, dir)
	if !bytes.Equal(root, c.root) {
		t.Error("the root has another handle after a restart")
	}
	check("after a restart")
	if h, st := c.lookup(c.walk("b"), "f"); st != ok || !bytes.Equal(h, f) {
		t.Errorf("the file has another handle after a restart (%d)", st)
	}
	if _, st := c.getattr(gone); st != errStale {
		t.Errorf("GETATTR of a removed file after a restart: %d", st)
	}
}

// TestTreeOfTheUser: what the user puts into the tree himself is shown as root's,
// links are not followed, and nothing waits for a FIFO.
func TestTreeOfTheUser(t *testing.T) {
	outer := t.TempDir()
	dir := filepath.Join(outer, "tree")
	os.Mkdir(dir, 0o755)
	os.WriteFile(filepath.Join(outer, "outside"), []byte("secret"), 0o644)
	os.WriteFile(filepath.Join(dir, "file"), []byte("mine"), 0o640)
	os.Chmod(filepath.Join(dir, "file"), 0o640|os.ModeSetuid)
	os.WriteFile(filepath.Join(dir, "closed"), []byte("mine"), 0o400)
	os.Symlink("../outside", filepath.Join(dir, "link"))
	os.Symlink("..", filepath.Join(dir, "up"))
	unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666)
	os.Mkdir(filepath.Join(dir, "sub"), 0o755)
	os.Mkdir(filepath.Join(dir, stagePrefix+"left"), 0o700) // by a server that was killed
	os.WriteFile(filepath.Join(dir, stagePrefix+"left2"), nil, 0o600)
	s, c, _ := treeServer(t, dir)
	if a, st := c.getattr(c.walk("file")); st != ok || a.uid != 0 || a.gid != 0 || a.mode != 0o640 {
		t.Errorf("file: %d %+v", st, a)
	}
	closed := c.walk("closed")
	if _, _, _, st := c.write(closed, 0, []byte("root"), unstable); st != ok {
		t.Errorf("WRITE to a file that is closed on disk: %d", st)
	}
	if a, _ := c.getattr(closed); a.mode != 0o400 {
		t.Errorf("it has mode %o after it", a.mode)
	}
	for _, name := range []string{"link", "up"} {
		h := c.walk(name)
		if a, _ := c.getattr(h); a.typ != 5 || a.uid != 0 {
			t.Errorf("%s: %+v", name, a)
		}
		if st, d := c.nfs(5, func(e *buffer) { e.opaque(h) }); st != ok || d.maybeAttrs() == nil || !strings.HasPrefix(string(d.opaque(100)), "..") {
			t.Errorf("READLINK of %s: %d", name, st)
		}
		if st := c.setattr(h, set{uid: to(uint32(5))}); st != errPerm {
			t.Errorf("SETATTR of %s: %d, want EPERM", name, st)
		}
		if _, _, _, st := c.write(h, 0, []byte("x"), unstable); st != errInval {
			t.Errorf("WRITE to %s: %d", name, st)
		}
	}
	if _, _, st := c.read(c.walk("fifo"), 0, 1); st != errInval {
		t.Errorf("READ of a FIFO: %d", st)
	}
	// A directory that becomes a link while its handle is known.
	sub := c.walk("sub")
	c.create(sub, "inner", createGuarded, set{})
	inner := c.walk("sub", "inner")
	s.files.evictIdle()
	os.Rename(filepath.Join(dir, "sub"), filepath.Join(outer, "sub"))
	os.Symlink("../sub", filepath.Join(dir, "sub"))
	if _, st := c.getattr(inner); st != errStale {
		t.Errorf("GETATTR of a file over a link that leads out: %d", st)
	}
	s.exports[0].tree.refresh()
	for _, l := range c.listAll(c.root, 4096, true) {
		if strings.HasPrefix(l.name, stagePrefix) {
			t.Errorf("clients see %s", l.name)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, stagePrefix+"*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	if text, _ := os.ReadFile(filepath.Join(outer, "outside")); string(text) != "secret" {
		t.Errorf("the file outside is now %q", text)
	}
}

// TestTreePoorFileSystem: without the kernel's handles, nameless files and
// all that, as on some overlay and user-space file systems.
func TestTreePoorFileSystem(t *testing.T) {
	dir := t.TempDir()
	poor := func(s *Server) {
		tr := s.exports[0].tree
		tr.noTmpfile.Store(true)
		tr.mu.Lock()
		defer tr.mu.Unlock()
		tr.mount = -1
		tr.top, _ = tr.handleAt(tr.root, "")
		s.exports[0].root = s.files.get(s.exports[0], tr.top, kindDir)
		tr.places = newPlaces(tr.places.seed)
		tr.walked = walk{}
	}
	serve := func() (*client, func()) {
		s, c, stop := treeServer(t, dir)
		s.exports[0].tree.walks.Wait()
		poor(s)
		c.root, _ = c.mount("/")
		return c, stop
	}
	c, stop := serve()
	d, _, st := c.mkdir(c.root, "d", 0o700)
	if st != ok {
		t.Fatal(st)
	}
	h, a, st := c.create(d, "f", createGuarded, set{mode: to(uint32(0o750)), uid: to(uint32(9))})
	if st != ok || a.mode != 0o750 || a.uid != 9 {
		t.Fatalf("CREATE: %d %+v", st, a)
	}
	if _, _, st := c.create(d, "f", createGuarded, set{}); st != errExist {
		t.Errorf("CREATE of a name that is there: %d", st)
	}
	if _, _, st := c.mkdir(c.root, "d", 0o700); st != errExist {
		t.Errorf("MKDIR of a name that is there: %d", st)
	}
	c.write(h, 0, []byte("data"), unstable)
	stop()
	c, _ = serve()
	if data, _, st := c.read(h, 0, 10); st != ok || string(data) != "data" {
		t.Errorf("READ after a restart: %q %d", data, st)
	}
}

// TestTreeMixed: the two kinds of trees are never taken for each other.
func TestTreeMixed(t *testing.T) {
	plain, marked := t.TempDir(), t.TempDir()
	markTop(t, marked)
	for _, tt := range []struct {
		export Export
		want   string
	}{
		{Export{Path: "/", Dir: plain, Kept: true}, "was not made without root"},
		{Export{Path: "/", Dir: marked}, map[bool]string{false: "made without root", true: "privilege"}[kept()]},
		{Export{Path: "/", Dir: "/proc/self", Kept: true}, "extended attributes"},
	} {
		s, err := New(Config{Exports: []Export{tt.export}, HandleKey: testKey})
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want something with %q", tt.export, err, tt.want)
		}
	}
	if !kept() {
		if err := os.Chown(marked, nobody, nobody); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Config{Exports: []Export{{Path: "/", Dir: marked, Kept: true}}, HandleKey: testKey}); err == nil || !strings.Contains(err.Error(), "65534") {
			t.Errorf("another user's tree: %v", err)
		}
	}
}
