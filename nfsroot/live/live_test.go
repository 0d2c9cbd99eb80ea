package live

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"krgimage/configs"
	"krgimage/nfsroot/meta"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// kept says that this is no privileged process: live roots are kept without
// privilege. Root runs all tests again in such a process (see TestWithoutRoot).
func kept() bool { return os.Geteuid() != 0 }

// open opens a tree as it is meant to be.
func open(t *testing.T, dir string) meta.Root {
	t.Helper()
	root, err := meta.Open(dir, kept())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

// TestWithoutRoot runs every test again as an ordinary user.
func TestWithoutRoot(t *testing.T) {
	if kept() {
		t.Skip("this is the ordinary user's process: every test is one without root")
	}
	tmp, err := os.MkdirTemp("", "krgimage-live-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	const user = 65534
	if err := os.Chown(tmp, user, user); err != nil {
		t.Fatal(err)
	}
	// By this name the program can be run from a directory that is closed to
	// the user.
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.v", "-test.timeout=8m")
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("as an ordinary user: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// item is an entry of a synthetic archive.
type item struct {
	name  string // a trailing slash is a directory
	text  string
	mode  int64 // 0: 0644 or 0755
	uid   int
	link  string // symbolic
	hard  string
	xattr map[string]string
	char  [2]int64
}

func archive(t *testing.T, items ...item) Artefact {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, it := range items {
		h := &tar.Header{Name: it.name, Mode: it.mode, Uid: it.uid, Gid: it.uid, Size: int64(len(it.text)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		switch {
		case strings.HasSuffix(it.name, "/"):
			h.Typeflag = tar.TypeDir
			if it.mode == 0 {
				h.Mode = 0o755
			}
		case it.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, it.link
		case it.hard != "":
			h.Typeflag, h.Linkname = tar.TypeLink, it.hard
		case it.char != [2]int64{}:
			h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, it.char[0], it.char[1]
		}
		for k, v := range it.xattr {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(it.text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b.Bytes())
	return Artefact{Path: path, Digest: "sha256:" + hex.EncodeToString(sum[:])}
}

// netRaw is security.capability for CAP_NET_RAW, revision 2 (capability.h).
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// base is a Debian root in small; version tells two of them apart.
func base(t *testing.T, version string, packages ...string) Artefact {
	var status strings.Builder
	for _, p := range append([]string{"base-files"}, packages...) {
		fmt.Fprintf(&status, "Package: %s\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n\n", p)
	}
	items := []item{
		{name: "./"}, {name: "etc/"}, {name: "etc/debian_version", text: version},
		{name: "etc/passwd", text: "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1::/usr/sbin:/usr/sbin/nologin\n"},
		{name: "etc/shadow", text: "root:*:20000:0:99999:7:::\ndaemon:*:20000:0:99999:7:::\n", mode: 0o640},
		{name: "etc/group", text: "root:x:0:\nshadow:x:42:\nadm:x:4:\n"},
		{name: "etc/gshadow", text: "root:*::\nshadow:*::\nadm:*::\n", mode: 0o640},
		{name: "etc/skel/"}, {name: "etc/skel/.profile", text: "# profile\n"},
		{name: "usr/"}, {name: "usr/bin/"}, {name: "usr/lib/"}, {name: "lib", link: "usr/lib"},
		{name: "usr/bin/su", text: "su", mode: 0o4755},
		{name: "usr/bin/ping", text: "ping", mode: 0o755, xattr: map[string]string{"security.capability": netRaw}},
		{name: "usr/bin/perl", text: "perl", mode: 0o755}, {name: "usr/bin/perl5", hard: "usr/bin/perl"},
		{name: "dev/"}, {name: "dev/null", char: [2]int64{1, 3}, mode: 0o666},
		{name: "root/", mode: 0o700}, {name: "root/.bashrc", text: "image's " + version},
		{name: "root/new-in-" + version, text: "x"},
		{name: "home/"}, {name: "srv/"}, {name: "opt/"}, {name: "usr/local/"}, {name: "usr/local/bin/"},
		{name: "var/"}, {name: "var/mail/", mode: 0o2775, uid: 8},
		{name: "var/lib/"}, {name: "var/lib/dpkg/"}, {name: "var/lib/dpkg/status", text: status.String()},
	}
	return archive(t, items...)
}

func modules(t *testing.T, release string) Artefact {
	return archive(t, item{name: "usr/lib/modules/" + release + "/"}, item{name: "usr/lib/modules/" + release + "/modules.dep", text: release})
}

func overlay(t *testing.T, version string, more ...item) Artefact {
	return archive(t, append([]item{
		{name: "usr/sbin/krg", text: "krg " + version, mode: 0o755},
		{name: "usr/local/bin/krgtool", text: "tool " + version, mode: 0o755},
		{name: "etc/krgimage/image.json", text: version},
	}, more...)...)
}

func testInput(t *testing.T) Input {
	t.Helper()
	cluster := configs.Default()
	cluster.SSH.Keys = []string{"ssh-ed25519 AAAA admin@example"}
	cluster.Users[0].Keys = []string{"ssh-ed25519 BBBB user@example"}
	return Input{
		State:     t.TempDir(),
		Image:     Image{Base: base(t, "one"), Modules: modules(t, "6.1"), Overlay: overlay(t, "one")},
		Cluster:   cluster,
		ExtraKeys: []string{"ssh-ed25519 CCCC head"},
		Hosts:     []Host{{netip.MustParseAddr("10.77.0.2"), []string{"krg-2"}}, {netip.MustParseAddr("10.77.0.1"), []string{"krg-1", "n1"}}},
	}
}

func mustSync(t *testing.T, in Input) Root {
	t.Helper()
	root, err := Sync(t.Context(), in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if link, err := filepath.EvalSymlinks(filepath.Join(in.State, "root", "live")); err != nil || link != root.Dir {
		t.Fatalf("root/live is %s (%v), returned was %s", link, err, root.Dir)
	}
	return root
}

func read(t *testing.T, parts ...string) string {
	t.Helper()
	text, err := open(t, parts[0]).ReadFile(filepath.Join(parts[1:]...))
	if err != nil {
		t.Error(err)
	}
	return string(text)
}

func write(t *testing.T, text string, parts ...string) {
	t.Helper()
	path := filepath.Join(parts...)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFirstSync(t *testing.T) {
	in := testInput(t)
	root := mustSync(t, in)
	if root.Report.Action != "made" {
		t.Errorf("action %q", root.Report.Action)
	}
	tree := open(t, root.Dir)
	if root.Kept != kept() {
		t.Errorf("the root is kept: %v", root.Kept)
	}
	stat := func(name string) syscall.Stat_t {
		info, err := tree.Lstat(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return syscall.Stat_t{}
		}
		return *info.Sys().(*syscall.Stat_t)
	}
	for _, want := range []struct {
		name string
		mode uint32
		uid  uint32
	}{
		{"usr/bin/su", unix.S_IFREG | 0o4755, 0},
		{"dev/null", unix.S_IFCHR | 0o666, 0},
		{"var/mail", unix.S_IFDIR | 0o2775, 8},
		{"var/chkpt", unix.S_IFDIR | 0o1777, 0},
		{"home/krg", unix.S_IFDIR | 0o700, 1000},
		{"home/krg/.profile", unix.S_IFREG | 0o644, 1000},
		{"etc/shadow", unix.S_IFREG | 0o640, 0},
		{"etc/ssh/ssh_host_ed25519_key", unix.S_IFREG | 0o600, 0},
		{"etc/krgimage/authorized_keys/krg", unix.S_IFREG | 0o644, 0},
		{"etc/krgimage/sshd_config", unix.S_IFREG | 0o644, 0},
		{"lib/modules/6.1/modules.dep", unix.S_IFREG | 0o644, 0},
	} {
		if st := stat(want.name); st.Mode != want.mode || st.Uid != want.uid {
			t.Errorf("%s: mode %o uid %d, want %o %d", want.name, st.Mode, st.Uid, want.mode, want.uid)
		}
	}
	if st := stat("dev/null"); st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("dev/null: %x", st.Rdev)
	}
	if st := stat("usr/bin/perl5"); st.Nlink != 2 {
		t.Errorf("hard link: %d links", st.Nlink)
	}
	attr := make([]byte, 64)
	if kept() {
		// Capabilities of programs are root's to give, and NFS has none.
	} else if n, err := unix.Getxattr(filepath.Join(root.Dir, "usr/bin/ping"), "security.capability", attr); err != nil || string(attr[:n]) != netRaw {
		t.Errorf("capabilities of ping: %x %v", attr[:n], err)
	}
	if shadow := read(t, root.Dir, "etc/shadow"); !strings.Contains(shadow, "\nkrg:*:") {
		t.Errorf("shadow: %s", shadow)
	}
	keys := read(t, root.Dir, "etc/krgimage/authorized_keys/krg")
	for _, key := range []string{"AAAA", "BBBB", "CCCC"} {
		if !strings.Contains(keys, key) {
			t.Errorf("key %s is missing: %s", key, keys)
		}
	}
	if keys := read(t, root.Dir, "etc/krgimage/authorized_keys/root"); strings.Contains(keys, "BBBB") || !strings.Contains(keys, "AAAA") {
		t.Errorf("root's keys: %s", keys)
	}
	if hosts := read(t, root.Dir, "etc/hosts"); !strings.Contains(hosts, "10.77.0.1\tkrg-1 n1 krg-1.krg\n10.77.0.2\tkrg-2") || !strings.HasPrefix(hosts, "127.0.0.1") {
		t.Errorf("hosts: %s", hosts)
	}
	if !strings.Contains(read(t, root.Dir, "etc/krgimage/sshd_config"), "PasswordAuthentication no\n") {
		t.Error("passwords are let in")
	}
	if _, _, _, _, err := ssh.ParseAuthorizedKey([]byte(root.HostKey)); err != nil {
		t.Errorf("host key %q: %v", root.HostKey, err)
	}
	again := mustSync(t, in)
	if again.Report.Action != "unchanged" || again.Dir != root.Dir || again.HostKey != root.HostKey {
		t.Errorf("second sync: %+v", again)
	}
}

func TestOverlayInPlace(t *testing.T) {
	in := testInput(t)
	in.Image.Overlay = overlay(t, "one", item{name: "usr/sbin/gone", text: "x"})
	root := mustSync(t, in)
	write(t, "mine", root.Dir, "etc/mine")
	write(t, "changed", root.Dir, "etc/motd")
	in.Image.Overlay, in.Image.Modules = overlay(t, "two"), modules(t, "6.2")
	again := mustSync(t, in)
	if again.Dir != root.Dir || again.Report.Action != "updated" {
		t.Fatalf("%+v", again)
	}
	if got := read(t, root.Dir, "usr/sbin/krg"); got != "krg two" {
		t.Errorf("krg: %q", got)
	}
	if _, err := os.Lstat(filepath.Join(root.Dir, "usr/sbin/gone")); err == nil {
		t.Error("a file that left the overlay is still there")
	}
	if read(t, root.Dir, "etc/mine") != "mine" || read(t, root.Dir, "etc/motd") != "changed" {
		t.Error("an update of the overlay changed other files")
	}
	read(t, root.Dir, "usr/lib/modules/6.1/modules.dep")
	in.Image.Modules = modules(t, "6.3")
	mustSync(t, in)
	read(t, root.Dir, "usr/lib/modules/6.2/modules.dep")
	if _, err := os.Lstat(filepath.Join(root.Dir, "usr/lib/modules/6.1")); err == nil {
		t.Error("modules of three kernels are kept")
	}
}

// dirty makes a live root that people have worked in.
func dirty(t *testing.T, dir string) {
	t.Helper()
	write(t, "thesis", dir, "home/krg/thesis.tex")
	write(t, "data", dir, "srv/data")
	write(t, "my own", dir, "root/.bashrc")
	write(t, "tool", dir, "usr/local/bin/mytool")
	write(t, "image", dir, "var/chkpt/17/v1/task_17.bin")
	write(t, "table", dir, "var/spool/cron/crontabs/krg")
	write(t, "rsa", dir, "etc/ssh/ssh_host_rsa_key")
	write(t, "by hand", dir, "etc/mything/conf")
	write(t, "changed", dir, "etc/debian_version")
	for name, more := range map[string]string{
		"etc/passwd":  "alice:x:1001:1001::/home/alice:/bin/bash\n",
		"etc/shadow":  "alice:$y$hash:20000:0:99999:7:::\n",
		"etc/group":   "alice:x:1001:\nphysics:x:1500:alice,krg\n",
		"etc/gshadow": "alice:!::\nphysics:!::alice\n",
	} {
		text := read(t, dir, name)
		if name == "etc/group" {
			text = strings.Replace(text, "adm:x:4:", "adm:x:4:alice", 1)
		}
		write(t, text+more, dir, name)
	}
	write(t, "alice's", dir, "home/alice/file")
	status := read(t, dir, "var/lib/dpkg/status")
	write(t, status+"\nPackage: htop\nStatus: install ok installed\nVersion: 3\nArchitecture: amd64\n\nPackage: gcc\nStatus: install ok installed\nVersion: 12\nArchitecture: amd64\n", dir, "var/lib/dpkg/status")
	write(t, "/.\n/usr\n/usr/bin\n/bin/htop\n", dir, "var/lib/dpkg/info/htop.list")
	write(t, "htop", dir, "usr/bin/htop")
}

func checkSwitched(t *testing.T, in Input, old string, root Root) {
	t.Helper()
	dir := root.Dir
	for name, want := range map[string]string{
		"home/krg/thesis.tex":         "thesis",
		"srv/data":                    "data",
		"root/.bashrc":                "my own",
		"root/new-in-two":             "x", // the new image's, merged in
		"root/new-in-one":             "x",
		"usr/local/bin/mytool":        "tool",
		"usr/local/bin/krgtool":       "tool two", // the overlay's again
		"usr/sbin/krg":                "krg two",
		"var/chkpt/17/v1/task_17.bin": "image",
		"var/spool/cron/crontabs/krg": "table",
		"etc/ssh/ssh_host_rsa_key":    "rsa",
		"etc/debian_version":          "two",
		"home/alice/file":             "alice's",
	} {
		if got := read(t, dir, name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if passwd := read(t, dir, "etc/passwd"); !strings.Contains(passwd, "alice:x:1001:") || !strings.Contains(passwd, "krg:x:1000:") || strings.Count(passwd, "\nalice:") != 1 {
		t.Errorf("passwd: %s", passwd)
	}
	if shadow := read(t, dir, "etc/shadow"); !strings.Contains(shadow, "alice:$y$hash:") || strings.Count(shadow, "\nalice:") != 1 {
		t.Errorf("shadow: %s", shadow)
	}
	if group := read(t, dir, "etc/group"); !strings.Contains(group, "physics:x:1500:alice,krg") || !strings.Contains(group, "adm:x:4:alice\n") {
		t.Errorf("group: %s", group)
	}
	if previous, err := filepath.EvalSymlinks(filepath.Join(in.State, "root/previous")); err != nil || previous != old {
		t.Errorf("previous is %s (%v), want %s", previous, err, old)
	}
	read(t, old, "etc/mything/conf")
	for _, name := range []string{"journal.json", filepath.Base(dir) + ".displaced"} {
		if _, err := os.Lstat(filepath.Join(in.State, "root", name)); err == nil {
			t.Errorf("root/%s is left over", name)
		}
	}
	r := root.Report
	if r.Action != "switched" || !slices.Equal(r.Packages, []string{"htop"}) {
		t.Errorf("report: %+v", r)
	}
	if !slices.Equal(r.Changes, []string{"/etc/debian_version", "/etc/mything"}) {
		t.Errorf("changes by hand: %v", r.Changes)
	}
	for _, want := range []string{"/home", "/usr/local", "account alice", "group physics"} {
		if !slices.Contains(r.Kept, want) {
			t.Errorf("the report does not say that %s was kept: %v", want, r.Kept)
		}
	}
}

func newImage(t *testing.T) Image {
	return Image{Base: base(t, "two", "gcc"), Modules: modules(t, "6.2"), Overlay: overlay(t, "two")}
}

func TestSwitch(t *testing.T) {
	in := testInput(t)
	first := mustSync(t, in)
	dirty(t, first.Dir)
	in.Image = newImage(t)
	second := mustSync(t, in)
	if second.Dir == first.Dir {
		t.Fatal("another base, the same tree")
	}
	checkSwitched(t, in, first.Dir, second)
	if got := second.Report.Lines(); len(got) < 3 {
		t.Errorf("report: %q", got)
	}
	// The next switch removes the root before the last.
	in.Image.Base = base(t, "three")
	third := mustSync(t, in)
	if _, err := os.Lstat(first.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the first root is still there: %v", err)
	}
	read(t, third.Dir, "home/krg/thesis.tex")
}

// TestSwitchInterrupted stops a switch at each of its points, and expects the
// next Sync to bring about the same as an undisturbed one.
func TestSwitchInterrupted(t *testing.T) {
	var points []string
	in := testInput(t)
	first := mustSync(t, in)
	dirty(t, first.Dir)
	in.Image = newImage(t)
	if _, err := syncRoot(t.Context(), in, nil, func(p string) error { points = append(points, p); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(points) < 15 {
		t.Fatalf("only %d points: %v", len(points), points)
	}
	for _, point := range points {
		t.Run(strings.ReplaceAll(point, "/", "_"), func(t *testing.T) {
			in := testInput(t)
			first := mustSync(t, in)
			dirty(t, first.Dir)
			in.Image = newImage(t)
			crash := errors.New("power cut")
			if _, err := syncRoot(t.Context(), in, nil, func(p string) error {
				if p == point {
					return crash
				}
				return nil
			}); !errors.Is(err, crash) {
				t.Fatalf("stopped with %v", err)
			}
			checkSwitched(t, in, first.Dir, mustSync(t, in))
		})
	}
}

// TestResumeWithThirdImage: the image changed again after the interruption.
func TestResumeWithThirdImage(t *testing.T) {
	in := testInput(t)
	first := mustSync(t, in)
	dirty(t, first.Dir)
	in.Image = newImage(t)
	crash := errors.New("power cut")
	if _, err := syncRoot(t.Context(), in, nil, func(p string) error {
		if p == "moved usr/local" {
			return crash
		}
		return nil
	}); !errors.Is(err, crash) {
		t.Fatal(err)
	}
	in.Image.Overlay = overlay(t, "three")
	root := mustSync(t, in)
	for name, want := range map[string]string{"usr/local/bin/krgtool": "tool three", "usr/local/bin/mytool": "tool", "home/krg/thesis.tex": "thesis", "etc/debian_version": "two"} {
		if got := read(t, root.Dir, name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestDamagedArtefactLeavesLiveRoot(t *testing.T) {
	in := testInput(t)
	first := mustSync(t, in)
	in.Image = newImage(t)
	f, err := os.OpenFile(in.Image.Base.Path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{'?'}, 700); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := Sync(t.Context(), in, nil); !errors.Is(err, errDamaged) {
		t.Errorf("%v", err)
	}
	if live, _ := filepath.EvalSymlinks(filepath.Join(in.State, "root/live")); live != first.Dir {
		t.Errorf("live is %s", live)
	}
	names, _ := filepath.Glob(filepath.Join(in.State, "root", "*"))
	for _, name := range names {
		if strings.HasSuffix(name, ".partial") || strings.Contains(name, "/2-") {
			t.Errorf("left over: %s", name)
		}
	}
}

// TestHostileTree: a node's root user controls the tree; nothing outside may be
// written or read through it.
func TestHostileTree(t *testing.T) {
	in := testInput(t)
	root := mustSync(t, in)
	victim := t.TempDir()
	for _, name := range []string{"etc/krgimage", "etc/ssh"} {
		tree := open(t, root.Dir)
		if err := tree.RemoveAll(name); err != nil {
			t.Fatal(err)
		}
		if err := tree.Symlink(victim, name); err != nil {
			t.Fatal(err)
		}
	}
	in.Image.Overlay = overlay(t, "two")
	if _, err := Sync(t.Context(), in, nil); err == nil {
		t.Error("a link out of the tree was accepted")
	}
	if names, _ := os.ReadDir(victim); len(names) > 0 {
		t.Errorf("written outside the tree: %v", names)
	}
}

func TestAccountLeavesConfiguration(t *testing.T) {
	in := testInput(t)
	root := mustSync(t, in)
	write(t, "thesis", root.Dir, "home/krg/thesis.tex")
	in.Cluster.Users = []configs.User{{Name: "eve", UID: 1001}}
	root = mustSync(t, in)
	if strings.Contains(read(t, root.Dir, "etc/passwd"), "krg:") {
		t.Error("the account is still there")
	}
	if _, err := os.Lstat(filepath.Join(root.Dir, keysDir, "krg")); err == nil {
		t.Error("its keys are still there")
	}
	read(t, root.Dir, "home/krg/thesis.tex")
	if !strings.Contains(strings.Join(root.Report.Lines(), "\n"), "account krg is no longer") {
		t.Errorf("%v", root.Report.Lines())
	}
}

// TestPreflight: a live root is never taken for one of the other kind.
func TestPreflight(t *testing.T) {
	in := testInput(t)
	if err := Preflight(filepath.Join(in.State, "none")); err != nil {
		t.Errorf("nothing there: %v", err)
	}
	root := mustSync(t, in)
	if err := Preflight(in.State); err != nil {
		t.Errorf("one's own: %v", err)
	}
	// What the other kind's would look like.
	want := "made without root"
	if kept() {
		want = "no attributes"
		if err := unix.Removexattr(root.Dir, meta.Name); err != nil {
			t.Fatal(err)
		}
		if err := Preflight("/root/x"); err == nil {
			t.Error("root's directory is accepted")
		}
	} else if err := unix.Setxattr(root.Dir, meta.Name, meta.Attr{Mode: unix.S_IFDIR | 0o755}.Append(nil), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Sync(t.Context(), in, nil); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "fix:") {
		t.Errorf("the other kind: %v, want something with %q", err, want)
	}
}
