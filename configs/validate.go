package configs

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Validate checks a complete configuration (one that Parse returned and a
// program changed since). Its error is of the type Errors, without places.
func (c *Cluster) Validate() error { return c.findings().err() }

// findings runs every check; each names the field it is about.
func (c *Cluster) findings() Errors {
	k := &checker{c: c}
	k.identity()
	k.debian()
	k.kernel()
	k.initramfs()
	k.network()
	k.boot()
	k.nfsroot()
	k.nodes()
	k.store()
	k.users()
	k.trial()
	return k.out
}

type checker struct {
	c   *Cluster
	out Errors
}

func (k *checker) bad(field, message, hint string) {
	k.out = append(k.out, &Error{Field: field, Message: message, Hint: hint})
}

// enum checks that value is one of the words of the field's schema.
func (k *checker) enum(field, value string, words ...string) {
	if slices.Contains(words, value) {
		return
	}
	hint := "one of " + strings.Join(words, ", ")
	if near := nearestWord(value, words); near != "" {
		hint = fmt.Sprintf("did you mean %s?", near)
	}
	k.bad(field, quote(value)+" is not a choice here", hint)
}

// within checks a whole number.
func (k *checker) within(field string, value, low, high int) {
	if value < low || value > high {
		k.bad(field, fmt.Sprintf("%d is not in %d..%d", value, low, high), "")
	}
}

// once reports items that a list has twice; key folds spellings of one thing.
func (k *checker) once(field string, items []string, key func(string) string) {
	first := map[string]int{}
	for i, s := range items {
		if j, ok := first[key(s)]; ok {
			k.bad(index(field, i), fmt.Sprintf("%s is in the list twice, first as %s", quote(s), index(field, j)), "remove one of them")
			continue
		}
		first[key(s)] = i
	}
}

func index(field string, i int) string { return fmt.Sprintf("%s[%d]", field, i) }

func same(s string) string { return s }

// dnsLabel is RFC 1123 section 2.1 in lower case.
var dnsLabel = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

const dnsLabelHint = "lower-case letters, digits and '-' inside, at most 63 characters, for example "

func (k *checker) identity() {
	c := k.c
	switch {
	case !dnsLabel.MatchString(c.Name):
		k.bad("name", quote(c.Name)+" is not a DNS label", dnsLabelHint+"krg")
	case len(c.Name) > 63-len("-255"):
		k.bad("name", fmt.Sprintf("%d characters are too many: the host names NAME-ID have at most 63", len(c.Name)), "")
	}
	if c.SessionID < 1 || c.SessionID > 9999 {
		k.bad("session_id", fmt.Sprintf("%d is not in 1..9999", c.SessionID), "any number no other cluster on this network has")
	}
}

var (
	suiteName = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)
	// packageName is Debian Policy section 5.6.1, less the last character '-',
	// which apt reads as "remove".
	packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]*[a-z0-9+.]$`)
	qualified   = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+[:=/]`)
)

func (k *checker) debian() {
	d := k.c.Debian
	if !suiteName.MatchString(d.Suite) {
		k.bad("debian.suite", quote(d.Suite)+" is not the code name of a suite", "for example trixie")
	}
	k.mirror("debian.mirror", d.Mirror)
	if d.Security != "" {
		k.mirror("debian.security_mirror", d.Security)
		if d.Suite == "sid" || d.Suite == "unstable" || d.Suite == "experimental" {
			k.bad("debian.security_mirror", d.Suite+" has no security updates of its own", `write security_mirror: ""`)
		}
	}
	for i, s := range d.Components {
		k.enum(index("debian.components", i), s, "main", "contrib", "non-free", "non-free-firmware")
	}
	if !slices.Contains(d.Components, "main") {
		k.bad("debian.components", "main is missing", "nothing can be installed without it: [main]")
	}
	k.once("debian.components", d.Components, same)
	k.packages("debian.packages", d.Packages)
}

func (k *checker) mirror(field, s string) {
	const hint = "for example http://deb.debian.org/debian"
	u, err := url.Parse(s)
	switch {
	case err != nil || strings.ContainsAny(s, " \t\r\n\"'\\") || u.Opaque != "":
		k.bad(field, quote(s)+" is not a URL", hint)
	case u.Scheme != "http" && u.Scheme != "https":
		k.bad(field, quote(s)+" is not an http or https URL", hint)
	case u.Hostname() == "":
		k.bad(field, quote(s)+" names no host", hint)
	case u.User != nil:
		// It would end up in the image's sources.list and in the manifest.
		k.bad(field, "a user name or password in the URL would be readable on every node", "use a mirror that needs none")
	case u.RawQuery != "" || u.Fragment != "" || u.ForceQuery:
		k.bad(field, quote(s)+" has a query or a fragment", hint)
	}
}

func (k *checker) packages(field string, names []string) {
	for i, s := range names {
		at := index(field, i)
		switch {
		case packageName.MatchString(s):
		case qualified.MatchString(s):
			k.bad(at, quote(s)+" is not a bare package name", "versions, suites and architectures can't be chosen here")
		case strings.HasSuffix(s, "-"):
			k.bad(at, quote(s)+" ends with '-', which apt reads as removal", "")
		default:
			k.bad(at, quote(s)+" is not a Debian package name", "lower-case letters, digits and + - . , at least two, for example htop")
		}
	}
	k.once(field, names, same)
}

// kernelArg is what can stand on the command line without quotes and without a
// meaning for iPXE, pxelinux or the kernel's own splitting.
var kernelArg = regexp.MustCompile(`^[A-Za-z_][!#%&()*+,./:;<=>?@\[\]^_{}~A-Za-z0-9|-]*$`)

// maxKernelArgs leaves room for what every node gets besides, within the 2047
// characters of x86 (COMMAND_LINE_SIZE).
const maxKernelArgs = 1600

// ownArgs are the kernel arguments that the boot chain sets itself, with the
// place of the same wish in this file.
var ownArgs = map[string]string{
	"session_id": "set session_id at the top of this file",
	"node_id":    "set the node's id in nodes.table",
	"autonodeid": "it follows from the node's id and address",
	"ip":         "the nodes always use DHCP; see network",
	"nfsroot":    "it follows from network.head and network.nfs_port",
	"root":       "it is always /dev/ram",
	"ro":         "it is always there",
	"rw":         "the initial root is read-only; the shared root is writable",
	"bootif":     "it is the MAC of the interface that booted",
	"initrd":     "the boot script names the initramfs",
	"init":       "stage 1 starts krg",
	"rdinit":     "stage 1 is /init",
	"noinitrd":   "a node can't boot without its initramfs",
}

func (k *checker) kernel() {
	kn := k.c.Kernel
	k.enum("kernel.flavour", kn.Flavour, "amd64", "cloud-amd64", "rt-amd64")
	total := 0
	for i, arg := range kn.Args {
		at := index("kernel.args", i)
		total += len(arg) + 1
		name, _, _ := strings.Cut(arg, "=")
		// The kernel takes '-' and '_' in a parameter's name for the same.
		why, own := ownArgs[strings.ToLower(strings.ReplaceAll(name, "-", "_"))]
		switch {
		case own:
			k.bad(at, quote(name)+" is set by krgimage", why)
		case strings.ContainsAny(arg, " \t\r\n"):
			k.bad(at, quote(arg)+" holds white space", "write one argument per item")
		case strings.ContainsAny(arg, "\"'`"):
			k.bad(at, quote(arg)+" holds quotes", "arguments that need quotes are not supported")
		case arg != "" && arg[0] >= '0' && arg[0] <= '9':
			k.bad(at, quote(arg)+" starts with a digit", `an argument with a comma inside [ ] needs quotes: ["console=ttyS0,115200"]`)
		case !kernelArg.MatchString(arg):
			k.bad(at, quote(arg)+" is not a kernel argument", "for example quiet or console=ttyS0,115200")
		}
	}
	if total > maxKernelArgs {
		k.bad("kernel.args", fmt.Sprintf("%d characters in all; the kernel has room for %d", total, maxKernelArgs), "")
	}
}

var moduleName = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

func (k *checker) initramfs() {
	in := k.c.Initramfs
	for i, s := range in.Modules {
		if !moduleName.MatchString(s) {
			k.bad(index("initramfs.modules", i), quote(s)+" is not a module name", "without folder and .ko, for example ixgbe")
		}
	}
	k.once("initramfs.modules", in.Modules, func(s string) string { return strings.ReplaceAll(s, "-", "_") })
	k.packages("initramfs.firmware", in.Firmware)
}

func (k *checker) boot() {
	k.enum("boot.bios", k.c.Boot.BIOS, "ipxe", "pxelinux")
	k.enum("boot.chain", k.c.Boot.Chain, "auto", "always")
}

func (k *checker) trial() {
	t := k.c.Trial
	k.within("trial.nodes", t.Nodes, 1, 64)
	k.within("trial.cpus", t.CPUs, 1, 255)
	switch {
	case t.Memory < 128<<20:
		k.bad("trial.memory", t.Memory.String()+" is too little for a node to boot", "at least 128MiB")
	case t.Memory > 1<<40:
		k.bad("trial.memory", t.Memory.String()+" is more than QEMU nodes are meant for", "at most 1TiB")
	case t.Memory%(1<<20) != 0:
		k.bad("trial.memory", t.Memory.String()+" is not a whole number of MiB", "")
	}
}
