package test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// nobody is an ordinary user that every Debian has: no privilege, no subordinate
// ids, but an entry in passwd, which the ssh client wants.
const nobody = 65534

// ordinaryUser moves the site's configuration and image to a directory of an
// ordinary user's, and returns that user's site.
func (s *site) ordinaryUser() *site {
	s.t.Helper()
	dir, err := os.MkdirTemp("", "krgimage-user-")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { os.RemoveAll(dir) })
	u := &site{t: s.t, dir: dir, uid: nobody, bin: filepath.Join(dir, "krgimage")}
	for from, to := range map[string]string{s.bin: "krgimage", s.path("cluster.yaml"): "", s.path("state/image"): "state/", s.path("state/parts"): "state/", s.path("state/debian"): "state/"} {
		to = u.path(to)
		if strings.HasSuffix(to, "state") {
			if err := os.MkdirAll(to, 0o755); err != nil {
				s.t.Fatal(err)
			}
		}
		if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
			s.t.Fatalf("cp: %v %s", err, out)
		}
	}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, nobody, nobody)
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

// rootlessChecks are things that go wrong where files have wrong owners, modes
// or types: as who, the command, its output.
var rootlessChecks = []struct{ user, command, want string }{
	{"root", "stat -c '%U:%G %a' /etc/shadow /etc/ssh/ssh_host_ed25519_key /usr/bin/su /home/krg / /tmp", "root:shadow 640\nroot:root 600\nroot:root 4755\nkrg:krg 700\nroot:root 755\nroot:root 1777"},
	{"root", "dpkg -V base-files base-passwd coreutils bash login passwd dpkg; echo verified", "verified"},
	{"krg", "cat /etc/shadow 2>&1 | tail -1 | grep -o 'Permission denied'", "Permission denied"},
	{"krg", "passwd -S krg | cut -c1-5", "krg L"}, // set-uid: reads the shadow
	{"root", "su krg -c 'id -un; id -u'", "krg\n1000"},
	{"root", "mknod /root/null c 1 3 && echo lost > /root/null && stat -c '%F %t:%T' /root/null && rm /root/null", "character special file 1:3"},
	{"krg", "mknod /home/krg/null c 1 3 2>/dev/null || echo refused", "refused"},
	{"krg", "mkfifo pipe && { echo through > pipe & cat pipe; } && stat -c %F pipe", "through\nfifo"},
	{"krg", "echo text > file && ln file hard && ln -s file soft && chmod 640 file && stat -c '%h %a %U' hard && readlink soft && cat soft", "2 640 krg\nfile\ntext"},
	{"krg", "mkdir dir && chmod 2750 dir && chgrp krg dir && touch dir/f && stat -c '%a %U' dir && chown root file 2>/dev/null || echo refused", "2750 krg\nrefused"},
	{"krg", "touch /etc/mine 2>/dev/null || echo refused; touch /tmp/krgs && rm /tmp/krgs && echo removed", "refused\nremoved"},
	{"root", `set -e; d=$(mktemp -d); mkdir -p $d/DEBIAN $d/usr/local/lib/krgtest; chmod 755 $d
printf 'Package: krgtest\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: test\n' > $d/DEBIAN/control
for i in $(seq 50); do echo $i > $d/usr/local/lib/krgtest/$i; done; chmod 4711 $d/usr/local/lib/krgtest/7
dpkg-deb --root-owner-group -b $d /root/krgtest.deb > /dev/null; dpkg -i /root/krgtest.deb > /dev/null
dpkg -V krgtest; stat -c '%a %U' /usr/local/lib/krgtest/7; dpkg -r krgtest > /dev/null; ls /usr/local/lib | grep -c krgtest || true`, "4711 root\n0"},
}

// testRootless: an ordinary user has a cluster of his own, with root's files and
// anybody's in it, and it outlives a crash of the head node.
func (s *site) testRootless() {
	u := s.ordinaryUser()
	u.fails("must run as root", "serve")
	u.startTrial("--nodes", "1")
	for _, c := range rootlessChecks {
		if got := u.ssh(c.user, 1, c.command); got != c.want {
			u.t.Errorf("%s runs %s\ngot %q, want %q", c.user, c.command, got, c.want)
		}
	}
	identity := "stat -c '%i %h %U:%G %a %F' /home/krg/* /home/krg/dir/f /etc/shadow /usr/bin/su; cat /home/krg/hard"
	before := u.ssh("root", 1, identity)

	// The head is killed while a node makes files.
	var report struct{ PID int }
	u.decode(&report, "trial", "status", "--json")
	u.ssh("krg", 1, "umask 022; mkdir many; nohup sh -c 'i=0; while :; do i=$((i+1)); mkdir many/$i; echo $i > many/$i/f; ln -s f many/$i/l; echo $i > many/last; done' > /dev/null 2>&1 &")
	waitFor(u.t, 3*time.Minute, "the node makes files", func() bool { return u.ssh("krg", 1, "ls many | wc -l") > "2" })
	if err := syscall.Kill(report.PID, syscall.SIGKILL); err != nil {
		u.t.Fatal(err)
	}
	waitFor(u.t, time.Minute, "the killed trial is gone", func() bool { _, _, err := u.try(time.Minute, "trial", "status"); return err != nil })

	u.startTrial("--nodes", "1")
	if after := u.ssh("root", 1, identity); !sameLines(before, after) {
		u.t.Errorf("before the crash\n%s\nafter it\n%s", before, after)
	}
	// What was made before the crash is whole: nothing of it is root's.
	if got := u.ssh("root", 1, "cd /home/krg/many && find . ! -user krg | wc -l; find . -type d ! -perm 755 | wc -l; find . -name '.krgimage*' | wc -l; find . -name l ! -type l | wc -l"); got != "0\n0\n0\n0" {
		u.t.Errorf("after the crash, files of another owner, mode, half made, or another type: %q", strings.Fields(got))
	}
	u.run(2*time.Minute, "trial", "stop")
	if out, err := exec.Command("find", u.dir, "!", "-uid", "65534").CombinedOutput(); err != nil || len(out) > 0 {
		u.t.Errorf("files that are not the user's (%v):\n%s", err, out)
	}
	// Root does not take the tree for one of its own.
	r := *u
	r.uid = 0
	r.fails("made without root", "trial")
}

// sameLines says whether every line of a is in b: directories grow.
func sameLines(a, b string) bool {
	for line := range strings.Lines(a) {
		if !strings.Contains(b+"\n", strings.TrimSuffix(line, "\n")+"\n") {
			return false
		}
	}
	return true
}
