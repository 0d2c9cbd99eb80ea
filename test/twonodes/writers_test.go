package twonodes

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"krgimage/nfsroot/nfs"
	"krgimage/test/uml"
)

// site is two nodes on a server that can be killed.
type site struct {
	dir    string // the served tree on this machine
	server *uml.Server
	guests []*uml.Guest
}

// work is what both nodes do at the same time in a directory of the tree.
type work struct {
	name     string
	programs []string                                // of this machine, that it takes
	prepare  func(t *testing.T, dir string)          // on this machine
	script   string                                  // on each node, in the directory; $NODE is its name
	progress int                                     // files in the directory when it is done, about
	check    func(t *testing.T, s *site, dir string) // on this machine and on the nodes
}

// kills is how often the server dies in the middle of each work.
const kills = 3

// TestTwoWriters has both nodes work in one tree with real programs while the
// server is killed and started again.
func TestTwoWriters(t *testing.T) {
	uml.Need(t)
	s := &site{dir: t.TempDir()}
	n := uml.NewNet(t)
	s.server = n.StartServer(t, t.TempDir(), nfs.Export{Path: "/", Dir: s.dir})
	s.guests = n.BootAll(t, "one", "two")
	for _, g := range s.guests {
		g.MountLocked(t, uml.Port, "/", mountDir)
	}
	for _, w := range []work{untar, gitWork, sqlite, compile, install} {
		t.Run(w.name, func(t *testing.T) { s.run(t, w) })
	}
}

func (s *site) run(t *testing.T, w work) {
	for _, p := range w.programs {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
	dir := filepath.Join(s.dir, w.name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w.prepare(t, dir)
	if err := s.attempt(t, w, dir); err != nil {
		t.Fatal(err)
	}
	w.check(t, s, dir)
}

// onNodes is where the nodes have a directory of the served tree.
func onNodes(dir string) string { return mountDir + "/" + filepath.Base(dir) }

// attempt has the work done with the server dying.
func (s *site) attempt(t *testing.T, w work, dir string) error {
	start := count(dir)

	begin := time.Now()
	g, ctx := errgroup.WithContext(t.Context())
	done := make(chan struct{})
	var running errgroup.Group
	for _, guest := range s.guests {
		running.Go(func() error {
			job := uml.Shell(w.script)
			job.Dir = onNodes(dir)
			job.Env = []string{"NODE=" + guest.Name, "HOME=/tmp", "GIT_CONFIG_NOSYSTEM=1"}
			out, err := guest.Run(ctx, job)
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", guest.Name, err, out)
			}
			return nil
		})
	}
	g.Go(func() error { defer close(done); return running.Wait() })
	killed := 0
	g.Go(func() error {
		for killed < kills {
			// The next part of the work is done: die in the middle of the rest.
			for count(dir) < start+(w.progress-start)*(killed+1)/(kills+1) {
				select {
				case <-done:
					return nil
				case <-ctx.Done():
					return nil
				case <-time.After(10 * time.Millisecond):
				}
			}
			if err := s.server.Restart(ctx); err != nil {
				return err
			}
			killed++
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	t.Logf("%s, the server killed %d times, %d files", time.Since(begin).Round(time.Second), killed, count(dir))
	if killed == 0 {
		t.Error("the server was never killed: the work was over too soon")
	}
	return nil
}

// count is how many files are below a directory; what goes away meanwhile
// doesn't matter.
func count(dir string) (n int) {
	_ = filepath.WalkDir(dir, func(string, fs.DirEntry, error) error { n++; return nil })
	return n
}

// tree is what is below a directory: names, modes, sizes, times to the second and
// contents.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	m := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		what := info.Mode().String()
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			what += fmt.Sprintf(" %d %x", info.ModTime().Unix(), sha256.Sum256(data))
		}
		m[rel] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// same compares two trees.
func same(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	var diff []string
	for name, w := range want {
		if got[name] != w {
			diff = append(diff, fmt.Sprintf("%s: %q, want %q", name, got[name], w))
		}
	}
	for name := range got {
		if want[name] == "" {
			diff = append(diff, name+": should not be there")
		}
	}
	sort.Strings(diff)
	if len(diff) > 10 {
		diff = append(diff[:10], fmt.Sprintf("and %d more", len(diff)-10))
	}
	if len(diff) > 0 {
		t.Errorf("%s:\n%s", what, strings.Join(diff, "\n"))
	}
}

// unpackedFiles is how many files each node's archive has.
const unpackedFiles = 5000

var untar = work{
	name: "untar", programs: []string{"tar"}, progress: 2 * unpackedFiles,
	prepare: func(t *testing.T, dir string) {
		for i, node := range []string{"one", "two"} {
			if err := os.WriteFile(filepath.Join(dir, node+".tar"), archive(t, uint64(i)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	},
	script: `mkdir $NODE; tar xf $NODE.tar -C $NODE`,
	check: func(t *testing.T, s *site, dir string) {
		for _, node := range []string{"one", "two"} {
			want := filepath.Join(t.TempDir(), node)
			run(t, "", "mkdir", want)
			run(t, "", "tar", "xf", filepath.Join(dir, node+".tar"), "-C", want)
			got, expected := tree(t, filepath.Join(dir, node)), tree(t, want)
			if len(expected) < unpackedFiles {
				t.Errorf("only %d files were unpacked", len(expected))
			}
			delete(got, ".")
			delete(expected, ".")
			same(t, "unpacked on "+node, got, expected)
		}
		// Each node reads what the other has unpacked.
		s.guests[0].Shell(t, "cd "+onNodes(dir)+"; tar df two.tar -C two")
		s.guests[1].Shell(t, "cd "+onNodes(dir)+"; tar df one.tar -C one")
	},
}

// archive makes a tar file of small files, links and directories.
func archive(t *testing.T, seed uint64) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	r := rand.New(rand.NewPCG(seed, 1))
	add := func(h tar.Header, data []byte) {
		h.ModTime, h.Uid, h.Gid = time.Unix(1_000_000_000+r.Int64N(1e8), 0), r.IntN(3000), r.IntN(3000)
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	for i := range unpackedFiles {
		dir := fmt.Sprintf("d%02d/", i%50)
		if i < 50 {
			add(tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}, nil)
		}
		name := fmt.Sprintf("%sfile%d", dir, i)
		switch i % 20 {
		case 18:
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: "file1", Mode: 0o777}, nil)
		case 19:
			add(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: fmt.Sprintf("d%02d/file%d", (i-19)%50, i-19)}, nil)
		default:
			data := make([]byte, r.IntN(6000))
			for j := range data {
				data[j] = byte(r.Uint32())
			}
			add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64([]uint32{0o644, 0o755, 0o4711, 0o600}[i%4])}, data)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// run is a command on this machine.
func run(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), args[0], args[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "HOME="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

const commits = 4

// gitWork: both nodes clone one repository, commit, collect garbage and push to
// it.
var gitWork = work{
	name: "git", programs: []string{"git"}, progress: 420,
	prepare: func(t *testing.T, dir string) {
		run(t, dir, "git", "init", "-q", "--bare", "-b", "main", "repo")
		run(t, dir, "git", "clone", "-q", "repo", "first")
		for i := range 30 {
			if err := os.WriteFile(filepath.Join(dir, "first", fmt.Sprintf("f%d", i)), bytes.Repeat([]byte{byte(i), '\n'}, 500), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		first := filepath.Join(dir, "first")
		run(t, first, "git", "add", ".")
		run(t, first, "git", "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "first")
		run(t, first, "git", "push", "-q", "origin", "HEAD:main")
		if err := os.RemoveAll(first); err != nil {
			t.Fatal(err)
		}
		run(t, dir, "chown", "-R", "0:0", ".")
	},
	script: fmt.Sprintf(`
		git clone -q repo $NODE
		cd $NODE
		git config user.name $NODE; git config user.email $NODE@x; git config gc.auto 0
		git checkout -q -b $NODE
		for i in $(seq %d); do
			echo "$NODE $i" >new$i; echo "$NODE $i" >>f$i
			git add .
			git commit -qm "$NODE $i"
		done
		git gc -q
		git push -q origin $NODE
		git fsck --full --strict`, commits),
	check: func(t *testing.T, s *site, dir string) {
		repo := filepath.Join(dir, "repo")
		run(t, repo, "git", "fsck", "--full", "--strict")
		for _, node := range []string{"one", "two"} {
			if got := strings.Fields(run(t, repo, "git", "rev-list", node)); len(got) != commits+1 {
				t.Errorf("branch %s has %d commits", node, len(got))
			}
			if got := run(t, repo, "git", "show", node+":new2"); got != node+" 2\n" {
				t.Errorf("the file that %s committed has %q", node, got)
			}
			clone := filepath.Join(dir, node)
			run(t, clone, "git", "fsck", "--full", "--strict")
			if out := run(t, clone, "git", "status", "--porcelain"); out != "" {
				t.Errorf("the clone of %s isn't clean:\n%s", node, out)
			}
		}
	},
}

const transactions = 40

// sqlite: a database for each node, with the rollback journal and with a
// write-ahead log, and one that both write at the same time, by the file locks.
var sqlite = work{
	name: "sqlite", programs: []string{"sqlite3"}, progress: 3*transactions + 6,
	prepare: func(t *testing.T, dir string) {
		run(t, dir, "sqlite3", "shared.db", "create table t(node text, i integer)")
	},
	script: fmt.Sprintf(`
		{
			echo ".timeout 600000"
			for i in $(seq %d); do
				echo "begin immediate; insert into t values('$NODE', $i); commit;"
				echo ".shell : >mark-$NODE-shared-$i"
			done
		} >/tmp/sql
		sqlite3 -bail shared.db </tmp/sql
		for mode in delete wal; do
			db=$NODE-$mode.db
			{
				echo "pragma journal_mode=$mode; create table t(i integer primary key, v text);"
				for i in $(seq %d); do
					echo "begin; insert into t values($i, hex(zeroblob(1500))); update t set v = v || '$i' where i %% 7 = $i %% 7; commit;"
					echo ".shell : >mark-$NODE-$mode-$i"
				done
			} >/tmp/sql
			sqlite3 -bail $db </tmp/sql
		done`, transactions/2, transactions/2),
	check: func(t *testing.T, s *site, dir string) {
		shared := run(t, dir, "sqlite3", "shared.db", "pragma integrity_check; select node, count(*), sum(i) from t group by node")
		n := transactions / 2
		if want := fmt.Sprintf("ok\none|%d|%d\ntwo|%d|%d\n", n, n*(n+1)/2, n, n*(n+1)/2); shared != want {
			t.Errorf("the shared database has %q, want %q", shared, want)
		}
		for i, node := range []string{"one", "two"} {
			for _, mode := range []string{"delete", "wal"} {
				query := fmt.Sprintf("cd %s; sqlite3 %s-%s.db 'pragma integrity_check; select count(*), sum(length(v)) > 30000 from t'", onNodes(dir), node, mode)
				// The other node reads it.
				if got, want := s.guests[1-i].Shell(t, query), fmt.Sprintf("ok\n%d|1\n", transactions/2); got != want {
					t.Errorf("%s, %s: %q, want %q", node, mode, got, want)
				}
			}
		}
	},
}

const sources = 5

// compile: both nodes build the same project; the results are the same as
// this machine's.
var compile = work{
	name: "gcc", programs: []string{"gcc"}, progress: 2*(sources+2) + sources + 3,
	prepare: func(t *testing.T, dir string) {
		var table strings.Builder
		for i := range sources {
			src := fmt.Sprintf("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\nint part%d(int n) { char b[100]; snprintf(b, sizeof b, \"%%d-%d\", n); return atoi(b) + (int)strlen(b); }\n", i, i)
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("part%d.c", i)), []byte(src), 0o644); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&table, "int part%d(int);\n", i)
		}
		table.WriteString("int printf(const char *, ...);\nint main(void) { int s = 0;\n")
		for i := range sources {
			fmt.Fprintf(&table, "s += part%d(%d);\n", i, i*100)
		}
		table.WriteString("printf(\"%d\\n\", s); return 0; }\n")
		if err := os.WriteFile(filepath.Join(dir, "main.c"), []byte(table.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	},
	script: buildScript + "./$NODE/program >/dev/null",
	check: func(t *testing.T, s *site, dir string) {
		cmd := exec.Command("/bin/sh", "-euc", buildScript)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "NODE=here")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		want := contents(t, filepath.Join(dir, "here"))
		for _, node := range []string{"one", "two"} {
			same(t, "built on "+node, contents(t, filepath.Join(dir, node)), want)
		}
		run := func(g *uml.Guest, node string) string { return g.Shell(t, onNodes(dir)+"/"+node+"/program") }
		if a, b := run(s.guests[0], "two"), run(s.guests[1], "one"); a != b || a == "" {
			t.Errorf("the programs print %q and %q", a, b)
		}
	},
}

const buildScript = `
	mkdir $NODE
	for c in *.c; do gcc -O1 -c -o $NODE/${c%.c}.o $c; done
	gcc -o $NODE/program $NODE/*.o
	`

// contents is a tree without times.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	m := tree(t, dir)
	for name, what := range m {
		f := strings.Fields(what)
		m[name] = f[0] + " " + f[len(f)-1]
	}
	return m
}

const packagedFiles = 300

// install: dpkg on both nodes, each with a root of its own, of packages in the
// shared tree; then an upgrade and a removal.
var install = work{
	name: "dpkg", programs: []string{"dpkg-deb"}, progress: 2 * packagedFiles,
	prepare: func(t *testing.T, dir string) {
		for version := 1; version <= 2; version++ {
			src := filepath.Join(t.TempDir(), "src")
			for i := range packagedFiles {
				p := filepath.Join(src, fmt.Sprintf("usr/share/krg-test/d%d/f%d", i%10, i))
				if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(p, bytes.Repeat([]byte{byte(i * version)}, 1000+i), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.MkdirAll(filepath.Join(src, "DEBIAN"), 0o755); err != nil {
				t.Fatal(err)
			}
			control := fmt.Sprintf("Package: krg-test\nVersion: %d\nArchitecture: all\nMaintainer: Test <test@example.org>\nDescription: files\n", version)
			if err := os.WriteFile(filepath.Join(src, "DEBIAN/control"), []byte(control), 0o644); err != nil {
				t.Fatal(err)
			}
			run(t, dir, "dpkg-deb", "-Zgzip", "--root-owner-group", "-b", src, fmt.Sprintf("krg-test_%d.deb", version))
		}
		for _, node := range []string{"one", "two"} {
			db := filepath.Join(dir, node, "var/lib/dpkg")
			for _, sub := range []string{"info", "updates", "triggers"} {
				if err := os.MkdirAll(filepath.Join(db, sub), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for _, f := range []string{"status", "available"} {
				if err := os.WriteFile(filepath.Join(db, f), nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
	},
	script: `
		dpkg --root=$PWD/$NODE --force-depends -i krg-test_1.deb
		dpkg --root=$PWD/$NODE --force-depends -i krg-test_2.deb
		dpkg --root=$PWD/$NODE -V krg-test`,
	check: func(t *testing.T, s *site, dir string) {
		want := filepath.Join(t.TempDir(), "want")
		run(t, dir, "dpkg-deb", "-x", "krg-test_2.deb", want)
		for _, node := range []string{"one", "two"} {
			same(t, "installed on "+node, tree(t, filepath.Join(dir, node, "usr/share/krg-test")), tree(t, filepath.Join(want, "usr/share/krg-test")))
			if status, err := os.ReadFile(filepath.Join(dir, node, "var/lib/dpkg/status")); err != nil || !strings.Contains(string(status), "Status: install ok installed") || !strings.Contains(string(status), "Version: 2") {
				t.Errorf("dpkg's status on %s: %v\n%s", node, err, status)
			}
		}
	},
}
