package configs

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
)

// exportPath is a path that goes through a kernel command line, exports(5) and
// mount(2) unquoted.
var exportPath = regexp.MustCompile(`^/[A-Za-z0-9._/@+-]*$`)

// mountOption is an option of nfs(5).
var mountOption = regexp.MustCompile(`^[a-z][a-z0-9_]*(=[A-Za-z0-9._:/-]+)?$`)

// ownOptions are mount options that the nodes' stage 1 sets.
var ownOptions = map[string]string{
	"port": "write nfsroot.port", "addr": "write nfsroot.server", "mountaddr": "write nfsroot.server",
	"vers": "nodes use version 3", "nfsvers": "nodes use version 3", "v3": "nodes use version 3", "v4": "nodes use version 3",
	"proto": "nodes use TCP", "udp": "nodes use TCP", "tcp": "nodes use TCP", "mountproto": "nodes use TCP",
	"ro": "the root is always written to", "rw": "it is always set", "hard": "it is always set",
	"nosuid": "the root has setuid programs", "noexec": "the root has programs", "nodev": "leave it out", "defaults": "leave it out",
	"_netdev": "leave it out", "auto": "leave it out", "noauto": "leave it out", "bg": "nodes try for ever", "fg": "nodes try for ever", "retry": "nodes try for ever",
	"soft": "a node must not lose its root", "softerr": "a node must not lose its root",
}

func (k *checker) nfsroot() {
	r := &k.c.NFSRoot
	k.within("nfsroot.port", r.Port, 1, 65535)
	if r.External() {
		k.externalRoot()
	} else {
		for _, f := range []struct {
			name string
			set  bool
		}{{"path", r.Path != ""}, {"mounted", r.Mounted != ""}, {"options", len(r.Options) > 0}, {"port", r.Port != 2049}} {
			if f.set {
				hint := "it is about an existing server: give nfsroot.server, too"
				if f.name == "port" {
					hint += "; krgimage's own server listens on network.nfs_port"
				}
				k.bad("nfsroot."+f.name, "there is no nfsroot.server", hint)
			}
		}
	}
	k.exports()
}

func (k *checker) externalRoot() {
	r, n := &k.c.NFSRoot, &k.c.Network
	switch {
	case !r.Server.Is4() || r.Server.IsUnspecified() || r.Server.IsMulticast() || r.Server.IsLoopback():
		k.bad("nfsroot.server", quote(r.Server.String())+" is not the IPv4 address of a server", "for example 10.77.0.253")
	case k.c.hasSubnet() && n.Subnet.Contains(r.Server):
		k.host("nfsroot.server", r.Server, "write the server's own address")
	case k.c.hasSubnet() && !n.Gateway.IsValid():
		k.bad("nfsroot.server", fmt.Sprintf("%s is outside %s and the nodes have no way there", r.Server, n.Subnet), "set network.gateway")
	}
	if r.Path == "" {
		k.bad("nfsroot.path", "is empty", "the directory that the server exports, for example /export/krg")
	} else {
		k.cleanPath("nfsroot.path", r.Path)
	}
	if r.Mounted != "" {
		k.cleanPath("nfsroot.mounted", r.Mounted)
		if r.Mounted == "/" {
			k.bad("nfsroot.mounted", "is this machine's own root", "for example /mnt/krg")
		}
	}
	for i, o := range r.Options {
		at := index("nfsroot.options", i)
		name, _, _ := strings.Cut(o, "=")
		switch why, own := ownOptions[name]; {
		case own:
			k.bad(at, quote(name)+" is set by krgimage", why)
		case !mountOption.MatchString(o):
			k.bad(at, quote(o)+" is not a mount option", "one option per item, for example mountport=20048")
		}
	}
	k.once("nfsroot.options", r.Options, func(o string) string { name, _, _ := strings.Cut(o, "="); return name })
}

func (k *checker) cleanPath(field, p string) bool {
	switch {
	case !strings.HasPrefix(p, "/"):
		k.bad(field, quote(p)+" is not an absolute path", "begin it with /")
	case path.Clean(p) != p:
		k.bad(field, quote(p)+" has parts that lead nowhere", "write "+path.Clean(p))
	case !exportPath.MatchString(p) || len(p) > 255:
		k.bad(field, quote(p)+" can't be named on a kernel command line", "letters, digits and . _ / @ + -, at most 255")
	default:
		return true
	}
	return false
}

// nodePaths are what a node has of its own, or what it can't do without to
// mount the rest.
var nodePaths = []string{"/dev", "/proc", "/sys", "/run", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64"}

func (k *checker) exports() {
	r := &k.c.NFSRoot
	if r.External() && len(r.Exports) > 0 {
		k.bad("nfsroot.exports", "the head node serves no files beside an existing server", "leave the exports out, or nfsroot.server")
		return
	}
	var ats, paths []string
	for i, e := range r.Exports {
		row := index("nfsroot.exports", i)
		ats, paths = append(ats, e.At), append(paths, e.Path)
		if k.cleanPath(row+".path", e.Path) && e.Path == "/" {
			k.bad(row+".path", "is all of the head node", "name the one directory that the nodes need")
		}
		if k.cleanPath(row+".at", e.At) {
			top := "/" + strings.Split(e.At, "/")[1]
			switch {
			case e.At == "/":
				k.bad(row+".at", "is the shared root", "for example /home")
			case slices.Contains(nodePaths, top):
				k.bad(row+".at", fmt.Sprintf("%s is in %s, which comes with the node or its root", e.At, top), "for example /home or /srv/data")
			}
			for j, other := range ats[:i] {
				if strings.HasPrefix(e.At, other+"/") || strings.HasPrefix(other, e.At+"/") {
					k.bad(row+".at", fmt.Sprintf("%s and %s (exports[%d]) lie in one another", e.At, other, j), "choose directories side by side")
				}
			}
		}
		k.enum(row+".squash", e.Squash, "none", "root")
	}
	k.once("nfsroot.exports", ats, same)
	for i, p := range paths {
		for j, other := range paths[:i] {
			if p == other {
				k.bad(index("nfsroot.exports", i)+".path", fmt.Sprintf("is that of exports[%d], too", j), "one directory has one place on the nodes")
			}
		}
	}
}
