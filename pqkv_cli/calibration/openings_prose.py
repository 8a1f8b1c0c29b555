"""First words of prose in English and other languages, and of mathematics. Data only; marks are those of `openings`."""

PROSE = (
    "The old <thing> at the edge of <place> had not been used for <number> years when <name>",
    "# A short history of <field>\n\nFew people who look at <field> today ask how",
    "<place>, Tuesday. The council decided last night to close the road to the <thing>, after",
    "Dear <name>,\n\nThank you for your message about the <thing>. I have looked into it and",
    "How to repair a <thing> at home\n\nYou will need",
    "Abstract. We study how <field> change over <number> years in the region around <place>. Our results",
    "The <thing> (from an older word for something carried) is a kind of",
    "I bought this <thing> in March and have used it nearly every day since. The good things first:",
    '"You cannot mean that," said <name>, and put the <thing> back on the table.',
    "Section <number>. Obligations of the tenant. The tenant shall",
    "Ingredients for <number> people: flour, butter, two eggs,",
    "The lecture today is about <field>. Before we begin, remember what we said last week:",
    "Minutes of the meeting on <field>. Present: <name>, <name>, <name>. 1. Report of the",
)

LANGUAGES = (
    "Der alte Brunnen stand seit <number> Jahren im Hof, und niemand in <place> wusste mehr, wer ihn",
    "Sehr geehrte Damen und Herren,\n\nvielen Dank für Ihre Anfrage vom Montag. Leider müssen wir Ihnen",
    "Quand <name> est arrivée à <place>, il pleuvait depuis <number> jours et",
    "Le conseil municipal de <place> a décidé hier soir de",
    "La primera vez que <name> vio el mar tenía <number> años y",
    "Para preparar esta receta se necesitan <number> gramos de harina,",
    "La città di <place> è conosciuta soprattutto per",
    "Gentile <name>, le scrivo a proposito della",
    "A cidade de <place> fica perto do rio e tem cerca de <number> mil habitantes. Durante o",
    "Когда <name> приехал в город, было уже темно, и",
    "История этого моста началась <number> лет назад, когда",
    "那天早上,城里下着大雨,老师走进教室,对学生们说:",
    "这座城市位于河流的北岸,有<number>年的历史,",
    "昔、山の近くの小さな村に、一人の若い大工が住んでいました。ある日、",
    "어느 날 아침, 작은 마을의 시장에서",
    "في صباح يوم من أيام الشتاء، خرج الرجل من بيته",
    "De trein naar <place> had <number> minuten vertraging, en op het perron",
    "W małym mieście nad rzeką mieszkała kobieta, która",
    "<place> şehrinde bu yıl <number> gün boyunca",
    "हर सुबह गाँव के लोग नदी के किनारे",
)

MATHEMATICS = (
    "Theorem <number>. Let $G$ be a finite group and $H$ a subgroup of $G$. Then",
    "Problem. <name> has <number> apples and gives a third of them to <name>. How many",
    "We compute the integral $\\int_0^1 x^2 e^{x}\\,dx$. Integrating by parts,",
    "Solve for $x$: $2x^2 - <number>x + 5 = 0$. First,",
    "Proof. Suppose, to the contrary, that there are only finitely many primes $p_1, \\dots, p_n$. Consider",
    "Let $X_1, X_2, \\dots$ be independent random variables with mean $\\mu$ and variance $\\sigma^2$. By",
    "Exercise <number>. A train leaves <place> at 9:40 and travels at <number> km/h. Another train",
    "\\begin{align}\n\\nabla \\times \\mathbf{E} &= -\\frac{\\partial \\mathbf{B}}{\\partial t} \\\\\n",
    "Step 1: write <number> as a product of primes.",
)
